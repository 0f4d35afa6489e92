"""A checkpoint on disk is checked without a model: what is damaged is named, with the older checkpoint to resume from."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dapo_mcore.checkpoint.stored import check_stored, open_visible, read_stored, unreadable_named, what_then
from dapo_mcore.errors import CheckpointError, DamagedCheckpoint
from dapo_mcore.model_files.manifest import write_manifest
from tests.checkpoint.stored_checkpoint import (
    as_format_2,
    cut_chunks,
    edit_state,
    edit_train,
    evil_common,
    evil_metadata,
    flip,
    truncate,
    unnumbered,
    write_checkpoint,
)

OLD_DAMAGE: dict[str, Callable[[Path], object]] = {
    "no_json": lambda path: (path / "state.json").unlink(),
    "empty_json": truncate("state.json", 0),
    "half_json": truncate("state.json", 100),
    "braces": lambda path: (path / "state.json").write_text("{}"),
    "a_list": lambda path: (path / "state.json").write_text("[1]"),
    "no_text": lambda path: (path / "state.json").write_bytes(b"\xff\xfe{"),
    "wrong_type": lambda path: edit_train(path, step="2"),
    "no_field": lambda path: edit_train(path, loader=None),
    "newer": lambda path: edit_state(path, format=4),
    "arrays": truncate("state.safetensors", 9),
    "no_arrays": truncate("state.safetensors", 0),
    "common": truncate("megatron/common.pt", 10),
    "no_common": truncate("megatron/common.pt", 0),
    "metadata_json": truncate("megatron/metadata.json", 0),
    "metadata_list": lambda path: (path / "megatron" / "metadata.json").write_text("[]"),
    "metadata": truncate("megatron/.metadata", 200),
    "half_metadata": lambda path: truncate("megatron/.metadata", (path / "megatron/.metadata").stat().st_size // 2)(
        path
    ),
    "no_metadata": truncate("megatron/.metadata", 0),
    "no_shard": lambda path: next((path / "megatron").glob("*.distcp")).unlink(),
    "half_shard": cut_chunks,
    "evil_metadata": evil_metadata,
    "evil_common": evil_common,
    "old_and_wrong": lambda path: unnumbered(path, tied=True),
}


OLDER = ["a start with checkpoint.resume auto sets step_000002 aside and goes on from", "step_000001"]


OLD_ERRORS = {
    "no_json": ["not a whole checkpoint: it lacks state.json; a start", *OLDER],
    "empty_json": ["state.json is damaged: Expecting value", *OLDER],
    "half_json": ["state.json is damaged", *OLDER],
    "braces": ["state.json is damaged: train: Field required", *OLDER],
    "a_list": ["state.json is damaged: its content: Input should be a valid dictionary", *OLDER],
    "no_text": ["state.json is damaged: 'utf-16", *OLDER],
    "wrong_type": ["state.json is damaged: train.step: Input should be a valid integer", *OLDER],
    "no_field": ["state.json is damaged: train.loader: Field required", *OLDER],
    "newer": ["has format 4, and this version of dapo_mcore reads up to 3; resume with the version that wrote it"],
    "arrays": ["state.safetensors is truncated or damaged", *OLDER],
    "no_arrays": ["state.safetensors is truncated or damaged", *OLDER],
    "common": ["common.pt is truncated or damaged", *OLDER],
    "no_common": ["common.pt is truncated or damaged", *OLDER],
    "metadata_json": ["metadata.json is truncated or damaged: Expecting value", *OLDER],
    "metadata_list": ["metadata.json is truncated or damaged: it does not say sharded_backend torch_dist", *OLDER],
    "metadata": [".metadata cannot be read", *OLDER],
    "half_metadata": [".metadata cannot be read: pickle data was truncated", *OLDER],
    "no_metadata": [".metadata cannot be read", *OLDER],
    "no_shard": [".distcp is missing", *OLDER],
    "half_shard": ["__1_0.distcp is truncated", *OLDER],
    "evil_metadata": [".metadata cannot be read: it wants posix.mkdir, which no checkpoint metadata needs", *OLDER],
    "evil_common": ["common.pt is truncated or damaged: it is no pickle of plain values", *OLDER],
    "old_and_wrong": [
        "has no format number",
        "parallel.pipeline_parallel 2, and so its optimizer state is wrong; its weights are right: start a new run from",
    ],
}


TENSORS = "shards/rank_00001.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda path: [shutil.rmtree(path), path.mkdir()], "it lacks manifest.json"),
    "no_manifest": (lambda path: (path / "manifest.json").unlink(), "it lacks manifest.json"),
    "half_manifest": (truncate("manifest.json", 50), "manifest.json is damaged"),
    "no_json": (lambda path: (path / "state.json").unlink(), "state.json is missing"),
    "half_json": (truncate("state.json", 100), "state.json is truncated: 100 of"),
    "bit_of_json": (flip("state.json", 30), "state.json is changed: its SHA-256 is not that of manifest.json"),
    "bit_of_arrays": (flip("state.safetensors", -1), "state.safetensors is changed: its SHA-256"),
    "bit_of_index": (flip("shards/index.json", 60), "index.json is changed: its SHA-256"),
    "no_shard": (lambda path: (path / TENSORS).unlink(), "rank_00001.safetensors is missing"),
    "half_shard": (
        lambda path: truncate(TENSORS, (path / TENSORS).stat().st_size - 1)(path),
        "1.safetensors is truncated",
    ),
    "longer_shard": (lambda path: truncate(TENSORS, 10_000)(path), "rank_00001.safetensors is changed: 10000 of"),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The newest checkpoint of a run, of step 2; that of step 1 lies beside it."""
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step_000001").mkdir(parents=True)
    write_checkpoint(folder / "step_000002")
    return folder / "step_000002"


def test_a_whole_checkpoint_is_read(checkpoint: Path) -> None:
    check_stored(checkpoint)
    found = read_stored(checkpoint)
    assert (found.format, found.train.step, found.train.num_updates, found.adam_step) == (3, 2, 4, 4.0)
    assert found.train.loader == {"epoch": 0, "offset": 8}
    assert found.train.sampler_arrays["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_with_what_to_do(checkpoint: Path, case: str) -> None:
    spoil, expected = DAMAGE[case]
    spoil(checkpoint)
    with pytest.raises(CheckpointError) as caught:
        check_stored(checkpoint)
    told = str(caught.value)
    assert all(part in told for part in [expected, *OLDER]), told


def test_a_file_that_only_rank_0_sees_is_waited_for_where_it_is_read_and_is_no_damage(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network disk may show a new file late. The checkpoint must not be set aside for that; ranks that read other files go on."""
    path, hidden = checkpoint / TENSORS, checkpoint / "hidden"
    path.rename(hidden)
    impatient = open_visible(checkpoint, patience_s=-1)
    assert torch.equal(impatient.read("w", (0,), (4,)), torch.zeros(4))
    told = r"rank_00001\.safetensors is missing.* on this machine, but not on that of rank 0, for -1 s: put the checkpoint on a disk"
    with pytest.raises(CheckpointError, match=told) as caught:
        impatient.read("w", (4,), (4,))
    assert not isinstance(caught.value, DamagedCheckpoint)
    monkeypatch.setattr(time, "sleep", lambda _: hidden.rename(path))
    assert torch.equal(open_visible(checkpoint, patience_s=60).read("w", (0,), (8,)), torch.zeros(8))


def test_an_index_that_only_rank_0_sees_is_waited_for(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, hidden = checkpoint / "shards" / "index.json", checkpoint / "hidden"
    path.rename(hidden)
    with pytest.raises(CheckpointError, match=r"index\.json is missing on this machine, but not on that of rank 0"):
        open_visible(checkpoint, patience_s=-1)
    monkeypatch.setattr(time, "sleep", lambda _: hidden.rename(path))
    assert open_visible(checkpoint, patience_s=60).size("w") == (8,)


def test_a_newer_format_is_refused(checkpoint: Path) -> None:
    edit_state(checkpoint, format=4)
    write_manifest(checkpoint, [checkpoint / "state.json"], {})
    with pytest.raises(
        CheckpointError, match=r"has format 4, and this version of dapo_mcore reads up to 3; resume with"
    ):
        check_stored(checkpoint)


@pytest.mark.parametrize("case", OLD_DAMAGE)
def test_damage_of_an_old_format_is_named_with_what_to_do(checkpoint: Path, case: str) -> None:
    as_format_2(checkpoint)
    OLD_DAMAGE[case](checkpoint)
    with pytest.raises(CheckpointError) as caught:
        check_stored(checkpoint)
    told = str(caught.value)
    assert all(part in told for part in OLD_ERRORS[case]), told
    assert not (checkpoint.parent / "ran").exists(), "nothing in a checkpoint is executed"


def test_an_absent_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no checkpoint at {tmp_path / 'step_000077'}"):
        read_stored(tmp_path / "step_000077")


def test_without_an_older_checkpoint_the_run_starts_anew(checkpoint: Path) -> None:
    (checkpoint.parent / "step_000001").rmdir()
    told = what_then(checkpoint)
    assert told.startswith("no older one is beside it: set checkpoint.resume never to start anew;")
    (checkpoint.parent / "step_000099.set_aside").mkdir()
    assert "rename step_000099.set_aside to step_000099 to go on from it, or set" in what_then(checkpoint)


def test_a_file_that_the_system_refuses_is_no_damage(checkpoint: Path) -> None:
    told = r"state.json cannot be read: Input/output error; mend the disk"
    with pytest.raises(CheckpointError, match=told) as caught, unreadable_named(checkpoint):
        raise OSError(errno.EIO, "Input/output error", str(checkpoint / "state.json"))
    assert not isinstance(caught.value, DamagedCheckpoint)


def test_the_first_format_has_adams_steps_beside_its_tensors(checkpoint: Path) -> None:
    as_format_2(checkpoint)
    unnumbered(checkpoint)
    assert (read_stored(checkpoint).format, read_stored(checkpoint).adam_step) == (1, 4.0)
    torch.save({"optimizer": {}}, checkpoint / "megatron" / "common.pt")
    with pytest.raises(CheckpointError, match=r"common\.pt is damaged: it lacks optimizer\.adam_step"):
        read_stored(checkpoint)
