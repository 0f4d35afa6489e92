"""A checkpoint becomes visible once and whole: a kill at any file operation loses nothing, and any changed byte is found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dapo_mcore.checkpoint.publish import Publication, publish
from dapo_mcore.checkpoint.stored import check_stored
from dapo_mcore.errors import DamagedCheckpoint, DapoError
from dapo_mcore.model_files.megatron_folder import open_store
from tests.checkpoint.stored_checkpoint import write_checkpoint

ROOT = Path(__file__).parents[2]


def loads(path: Path) -> None:
    """Read all of a checkpoint. Raise a DapoError if it is damaged."""
    check_stored(path)
    assert torch.equal(open_store(path).read("w", (0,), (8,)), torch.zeros(8))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    folder = tmp_path_factory.mktemp("killed")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.checkpoint.killing", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert "Traceback" not in done.stderr, done.stderr
    return folder, json.loads(done.stdout)


@pytest.mark.parametrize("victim", ["rank", "saver0", "saver1"])
def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(
    killed: tuple[Path, dict[str, list[str]]], victim: str
) -> None:
    """Of a rank, or of a rank's process that writes beside training. The next save leaves nothing else."""
    operations, published = killed[1][victim], []
    for number in range(len(operations)):
        folder = killed[0] / victim / str(number) / "checkpoints"
        whole = sorted(folder.glob("step_00000?"))
        for path in whole:
            loads(path)
        published.append(whole[-1].name)
        write_checkpoint(folder / "step_000003", keep=1)
        assert [path.name for path in folder.iterdir()] == ["step_000003"]
    if victim == "saver1":  # it writes a shard; the process of rank 0 publishes
        assert operations[-1] == "replace" and set(published) == {"step_000001"}
        return
    first = published.index("step_000002")
    assert set(published[:first]) == {"step_000001"} and set(published[first:]) == {"step_000002"}
    assert operations[first - 1] == "rename" and 0 < first < len(operations)
    assert {"open", "fsync", "rename", "replace", "unlink", "rmdir"} <= set(operations)


def test_any_changed_byte_is_found_before_it_is_used(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "step_000002"
    write_checkpoint(path)
    loads(path)
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        content = file.read_bytes()
        for at in range(len(content)):
            file.write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
            with pytest.raises(DapoError):
                loads(path)
                pytest.fail(f"byte {at} of {file.name}")
        file.write_bytes(content)
    loads(path)


def test_an_exchanged_place_in_the_index_is_found_by_every_reader(tmp_path: Path) -> None:
    """Both slices would still hold their bytes."""
    path = tmp_path / "checkpoints" / "step_000002"
    write_checkpoint(path)
    index = path / "shards" / "index.json"
    content = index.read_text()
    assert "[[[0],[4]" in content and "[[4],[4]" in content
    index.write_text(
        content.replace("[[0],[4]", "[[9],[4]").replace("[[4],[4]", "[[0],[4]").replace("[[9],[4]", "[[4],[4]")
    )
    with pytest.raises(DamagedCheckpoint, match=r"index\.json is changed: its SHA-256 is not that of manifest\.json"):
        open_store(path)


def test_it_waits_for_every_rank_and_an_exception_of_the_check_ends_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks for one rank's part at a time: a shared disk's server answers every look."""
    partial = tmp_path / "checkpoints" / "step_000002.partial"
    (partial / "shards").mkdir(parents=True)
    (partial / "shards" / "rank_00000.json").write_text(json.dumps({}))

    class Enough(Exception):
        pass

    def enough() -> None:
        raise Enough

    looked: list[str] = []
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: looked.append(path.name) or exists(path))
    with pytest.raises(Enough):
        publish(Publication(partial, partial.with_suffix(""), num_ranks=1024, keep=1), print, check=enough)
    assert looked == ["rank_00000.json", "rank_00001.json"]
    assert [path.name for path in partial.parent.iterdir()] == [partial.name]
    (partial / "shards" / "rank_00001.json").write_text(json.dumps({}))
    with pytest.raises(DamagedCheckpoint, match=r"rank_00000\.json is damaged"):
        publish(Publication(partial, partial.with_suffix(""), num_ranks=2, keep=1), print)


def test_a_folder_that_is_deleted_while_it_waits_is_an_error_at_once(tmp_path: Path) -> None:
    partial = tmp_path / "checkpoints" / "step_000002.partial"
    (partial / "shards").mkdir(parents=True)
    looks = iter([lambda: shutil.rmtree(partial), lambda: pytest.fail("it waits on")])
    with pytest.raises(FileNotFoundError):
        publish(Publication(partial, partial.with_suffix(""), num_ranks=1, keep=1), print, lambda: next(looks)())
    assert list(partial.parent.iterdir()) == []
