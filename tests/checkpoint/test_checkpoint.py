"""A resumed run is the uninterrupted one: bit for bit on the same mesh, to 1e-6 on another.

The workers run in real gloo processes; each spawn checks several things, because starting it is what costs time.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dapo_mcore.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from dapo_mcore.checkpoint.run_folder import latest_checkpoint
from dapo_mcore.checkpoint.run_state import TrainState
from dapo_mcore.errors import CheckpointError, DapoError
from dapo_mcore.model_files.hf_folder import RandomReader
from tests.actor.parity import Mesh, gather_named, hf_config, make_batch, make_config, shared_step, spawn

STATE = TrainState(
    step=2,
    num_updates=2,
    weight_version=3,
    loader={"epoch": 1, "offset": 7},
    sampler={"groups": [{"uid": "train:4", "samples": [{"text": "Ünïcode"}]}]},
    sampler_arrays={
        "token_ids": np.arange(5, dtype=np.int32),
        "logprobs": np.array([-0.1, np.nan], dtype=np.float32),
        "loss_mask": np.array([True, False]),
        "offsets": np.zeros(0, dtype=np.int64),
    },
    config="name: run\n",
)


def build_actor(config: Any, layout: Any, family: str = "qwen2", tied: bool = False) -> Any:
    """A fresh actor. 65 words are padded to 80 on two tensor-parallel ranks, to 72 on one."""
    from dapo_mcore.actor.actor import Actor

    model = hf_config(family, tied)
    model.vocab_size = 65
    return Actor(config, model, layout, RandomReader(model, seed=0))


def train(actor: Any, num_updates: int) -> list[float]:
    """Gradient norms and learning rates of some gradient steps."""
    mini_batches = shared_step(actor.config, actor.layout, make_batch(), actor)
    updates = [actor.update(mini_batches[0]) for _ in range(num_updates)]
    return [value for update in updates for value in (update.grad_norm, update.lr)]


def local_state(actor: Any) -> dict[str, torch.Tensor]:
    """Every tensor of this rank that training changes."""
    found = {f"policy.{name}": p.detach() for name, p in actor.policy.named_parameters()}
    for part in actor.optimizer.megatron.chained_optimizers:
        parameters = [p for group in part.optimizer.param_groups for p in group["params"]]
        for index, parameter in enumerate(parameters):
            found[f"master.{index}"] = parameter.detach()
            found |= {f"{key}.{index}": value for key, value in part.optimizer.state[parameter].items()}
    return {name: tensor.clone() for name, tensor in found.items()}


def differences(layout: Any, ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not bitwise equal, over all ranks."""
    assert ours.keys() == theirs.keys() and any(name.startswith("exp_avg_sq") for name in ours)
    here = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    found: list[Any] = [None] * layout.world_size
    torch.distributed.all_gather_object(found, here, group=layout.control_group)
    return [f"rank {rank}: {name}" for rank, names in enumerate(found) for name in names]


def settings(mesh: Mesh, **overrides: Any) -> Any:
    """A warm-up longer than the run: every step has its own learning rate."""
    return make_config(mesh, optimizer__warmup_updates=8, **overrides)


def interrupt_and_resume(layout: Any, mesh: Mesh, folder: str, options: dict[str, Any], tied: bool) -> dict[str, Any]:
    """Two steps, a checkpoint, two steps; then the same last two steps by a fresh actor that loads the checkpoint."""
    config = settings(mesh, **options)
    actor = build_actor(config, layout, tied=tied)
    train(actor, 2)
    actor.freeze_reference()  # a reference that only the checkpoint knows
    path = save_checkpoint(Path(folder), actor, STATE if layout.is_controller else None, layout, keep=2)
    saved = {name: p.detach().clone() for name, p in actor.policy.named_parameters()}
    expected = train(actor, 2)
    resumed = build_actor(config, layout, tied=tied)
    state = load_checkpoint(path, resumed, layout)
    loaded = {name: p.detach().clone() for name, p in resumed.policy.named_parameters()}
    found = train(resumed, 2)
    weights = gather_named(resumed, dict(resumed.policy.named_parameters()))
    if layout.is_controller:
        np.savez(
            Path(folder) / "after.npz", trace=found, **{name: t.detach().float().numpy() for name, t in weights.items()}
        )
    return {
        "moved": any(not torch.equal(saved[name], p) for name, p in actor.policy.named_parameters()),
        "loaded": all(torch.equal(saved[name], loaded[name]) for name in saved),
        "expected": expected,
        "found": found,
        "different": differences(layout, local_state(actor), local_state(resumed)),
        "updates": resumed.num_updates,
        "state": [state.step, state.weight_version, state.loader, state.sampler, state.config],
        "arrays": {name: [str(a.dtype), a.tobytes().hex()] for name, a in state.sampler_arrays.items()},
        "path": str(path),
    }


def check_resumed(result: dict[str, Any]) -> None:
    assert result["moved"] and result["loaded"]
    assert result["found"] == result["expected"]
    assert result["found"][1::2] == pytest.approx([1e-3 * 3 / 8, 1e-3 * 4 / 8], rel=1e-12)
    assert result["different"] == []
    assert result["updates"] == 4
    assert result["state"] == [STATE.step, STATE.weight_version, STATE.loader, STATE.sampler, STATE.config]
    assert result["arrays"] == {n: [str(a.dtype), a.tobytes().hex()] for n, a in STATE.sampler_arrays.items()}


def resume_and_fill_the_disk(layout: Any, mesh: Mesh, folder: str) -> dict[str, Any]:
    found = interrupt_and_resume(layout, mesh, folder, {}, False)
    return found | {"full": [a_full_disk(layout, mesh, Path(folder), rank) for rank in range(2)]}


def a_full_disk(layout: Any, mesh: Mesh, run_dir: Path, full: int) -> dict[str, Any]:
    """Both ranks' errors, and the folders that are left, where rank `full` may write no more than 10 kB into a file."""
    actor = build_actor(settings(mesh), layout)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if layout.rank == full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(DapoError) as caught:
            save_checkpoint(run_dir, actor, replace(STATE, step=3) if layout.is_controller else None, layout, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    told: list[Any] = [None] * layout.world_size
    torch.distributed.all_gather_object(told, str(caught.value), group=layout.control_group)
    return {"told": told, "left": sorted(path.name for path in (run_dir / "checkpoints").iterdir())}


@pytest.fixture(scope="module")
def tensor_parallel_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tensor_parallel")
    return spawn(resume_and_fill_the_disk, Mesh(tensor=2), str(folder))


@pytest.mark.parametrize("full", [0, 1])
def test_a_disk_that_takes_no_more_ends_every_rank_with_a_line(tensor_parallel_run: dict[str, Any], full: int) -> None:
    found = tensor_parallel_run["full"][full]
    for words in ("step_000003 cannot be written: File too large", "and start again: it goes on from", "step_000002"):
        assert words in found["told"][full]
        assert words in found["told"][1 - full]
    assert found["told"][1 - full].startswith(f"rank {full} failed: ")
    assert found["left"] == ["step_000002"]


def test_resume_is_bitwise_with_tensor_parallelism(tensor_parallel_run: dict[str, Any]) -> None:
    check_resumed(tensor_parallel_run)


def test_resume_is_bitwise_in_bf16_with_a_sharded_optimizer_and_a_reference_policy(tmp_path: Path) -> None:
    options = {"model__dtype": "bf16", "algo__kl__coef": 0.1}
    check_resumed(spawn(interrupt_and_resume, Mesh(data=2), str(tmp_path), options, False))


def test_resume_is_bitwise_with_tied_embeddings_on_two_pipeline_stages(tmp_path: Path) -> None:
    check_resumed(spawn(interrupt_and_resume, Mesh(pipeline=2), str(tmp_path), {}, True))


def in_one_process(layout: Any, mesh: Mesh, folder: str, tensor_parallel_path: str) -> dict[str, Any]:
    """All that needs an actor but no mesh; the plain optimizer, and a checkpoint that two tensor-parallel ranks wrote."""
    base = Path(folder)
    return {
        "plain": interrupt_and_resume(layout, mesh, folder, {"optimizer__distributed": False}, False),
        "reshard": reshard(layout, mesh, Path(tensor_parallel_path)),
        "first_step": [before_the_first_step(layout, mesh, base / str(own), own) for own in (True, False)],
        "settings": changed_settings(layout, mesh, Path(tensor_parallel_path)),
        "helpers": [process.name for process in multiprocessing.active_children()],
        "kept": retention(layout, mesh, base / "retention"),
        "errors": errors(layout, mesh, Path(tensor_parallel_path), base / "damaged"),
        "unnumbered": numbered_and_not(layout, mesh, Path(tensor_parallel_path), base / "unnumbered"),
    }


def reshard(layout: Any, mesh: Mesh, path: Path) -> dict[str, Any]:
    actor = build_actor(settings(mesh), layout)
    load_checkpoint(path, actor, layout)
    trace = train(actor, 2)
    weights = gather_named(actor, dict(actor.policy.named_parameters()))
    after = np.load(path.parents[1] / "after.npz")
    worst = max(np.abs(weights[name].detach().numpy() - after[name]).max() for name in weights)
    return {"trace": trace, "expected": after["trace"].tolist(), "worst": float(worst), "tensors": len(weights)}


def before_the_first_step(layout: Any, mesh: Mesh, folder: Path, distributed: bool) -> dict[str, Any]:
    """Saving before any gradient step neither disturbs the run nor loses anything."""
    config = settings(mesh, optimizer__distributed=distributed)
    undisturbed, saved, resumed = (build_actor(config, layout) for _ in range(3))
    path = save_checkpoint(folder, saved, replace(STATE, step=0, num_updates=0), layout, keep=1)
    load_checkpoint(path, resumed, layout)
    expected = train(undisturbed, 2)
    return {
        "expected": expected,
        "saved": train(saved, 2),
        "resumed": train(resumed, 2),
        "different": differences(layout, local_state(undisturbed), local_state(resumed)),
    }


def changed_settings(layout: Any, mesh: Mesh, path: Path) -> list[float]:
    """Learning rate and weight decay after a resume with other settings than the checkpoint's."""
    actor = build_actor(settings(mesh, optimizer__lr=5e-4, optimizer__weight_decay=0.25), layout)
    load_checkpoint(path, actor, layout)
    train(actor, 1)
    return [actor.optimizer.lr, max(group["weight_decay"] for group in actor.optimizer.megatron.param_groups)]


def retention(layout: Any, mesh: Mesh, folder: Path) -> list[Any]:
    """Folders after each of four saves with keep=2, the third of a step that exists; leftovers stay out of it."""
    actor = build_actor(settings(mesh), layout)
    (folder / "checkpoints" / "step_000004.partial" / "megatron").mkdir(parents=True)
    (folder / "checkpoints" / "step_000004.partial" / "junk.json").write_text("left by a killed run")
    (folder / "checkpoints" / "step_000099.partial").mkdir()
    seen: list[Any] = []
    for step in (2, 4, 4, 1_000_000):
        path = save_checkpoint(folder, actor, replace(STATE, step=step), layout, keep=2)
        seen.append(sorted(p.name for p in path.parent.iterdir()))
    files = [sorted(p.name for p in (path.parent / name).iterdir()) for name in ("step_000004", path.name)]
    return [*seen, *files, latest_checkpoint(folder).name]


def errors(layout: Any, mesh: Mesh, good: Path, folder: Path) -> dict[str, str]:
    """Messages by the kind of damage or misfit. A checkpoint of step 1 lies beside each damaged one."""
    actor = build_actor(settings(mesh), layout)
    with_reference = build_actor(settings(mesh, algo__kl__coef=0.1), layout)

    def damaged(name: str) -> str:
        path = folder / name / "checkpoints" / "step_000002"
        shutil.copytree(good, path)
        (path.parent / "step_000001").mkdir()
        DAMAGE[name](path)
        return message(path, actor)

    return {
        **{name: damaged(name) for name in DAMAGE},
        "absent": message(folder / "checkpoints" / "step_000077", actor),
        "untied": message(good, build_actor(settings(mesh), layout, family="llama", tied=True)),
        "reference": message(good, with_reference),
        "ran": [str(path) for path in folder.rglob("ran")],
    }


def message(path: Path, actor: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, actor, actor.layout)
    return str(caught.value)


def edit_state(path: Path, **changes: Any) -> None:
    """Change state.json's own fields; `None` deletes one."""
    stored = json.loads((path / "state.json").read_bytes()) | changes
    (path / "state.json").write_text(json.dumps({name: value for name, value in stored.items() if value is not None}))


def unnumbered(path: Path, **fits: Any) -> None:
    """Make it one of an earlier version, as far as files beside the tensors go."""
    stored = json.loads((path / "state.json").read_bytes())
    train = stored["train"] | {"config": "parallel: {pipeline_parallel: 2}"}
    own = stored["fits"] | {"optimizer.distributed": True} | fits
    edit_state(path, format=None, adam_step=None, train=train, fits=own)
    torch.save({"optimizer": {"adam_step": stored["adam_step"], "num_updates": 2}}, path / "megatron" / "common.pt")


def truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path / name, size)


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def evil_metadata(path: Path) -> None:
    (path / "megatron" / ".metadata").write_bytes(pickle.dumps(Evil(path.parent / "ran")))


def evil_common(path: Path) -> None:
    torch.save({"args": Evil(path.parent / "ran")}, path / "megatron" / "common.pt")


def cut_chunks(path: Path) -> None:
    file = sorted((path / "megatron").glob("*.distcp"))[1]
    os.truncate(file, file.stat().st_size - 1)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "no_json": lambda path: (path / "state.json").unlink(),
    "empty_json": truncate("state.json", 0),
    "half_json": truncate("state.json", 100),
    "braces": lambda path: (path / "state.json").write_text("{}"),
    "a_list": lambda path: (path / "state.json").write_text("[1]"),
    "no_text": lambda path: (path / "state.json").write_bytes(b"\xff\xfe{"),
    "wrong_type": lambda path: edit_state(path, train={**TRAIN, "step": "2"}),
    "no_field": lambda path: edit_state(path, train={k: v for k, v in TRAIN.items() if k != "loader"}),
    "newer": lambda path: edit_state(path, format=3),
    "arrays": truncate("state.safetensors", 9),
    "no_arrays": truncate("state.safetensors", 0),
    "common": truncate("megatron/common.pt", 10),
    "no_common": truncate("megatron/common.pt", 0),
    "metadata_json": truncate("megatron/metadata.json", 0),
    "metadata_list": lambda path: (path / "megatron" / "metadata.json").write_text("[]"),
    "metadata": truncate("megatron/.metadata", 200),
    "no_metadata": truncate("megatron/.metadata", 0),
    "no_shard": lambda path: next((path / "megatron").glob("*.distcp")).unlink(),
    "half_shard": cut_chunks,
    "evil_metadata": evil_metadata,
    "evil_common": evil_common,
    "old_and_wrong": lambda path: unnumbered(path, tied=True),
}
TRAIN = {name: getattr(STATE, name) for name in STATE.__dataclass_fields__ if name != "sampler_arrays"}

OLDER = ["step_000002 to resume from", "step_000001"]
ERRORS = {
    "absent": ["no checkpoint at", "step_000077"],
    "no_json": ["not a whole checkpoint: it lacks state.json; delete", *OLDER],
    "empty_json": ["state.json is damaged: Expecting value", *OLDER],
    "half_json": ["state.json is damaged", *OLDER],
    "braces": ["state.json is damaged: train: Field required", *OLDER],
    "a_list": ["state.json is damaged: its content: Input should be a valid dictionary", *OLDER],
    "no_text": ["state.json is damaged: 'utf-16", *OLDER],
    "wrong_type": ["state.json is damaged: train.step: Input should be a valid integer", *OLDER],
    "no_field": ["state.json is damaged: train.loader: Field required", *OLDER],
    "newer": ["has format 3, and this version of dapo_mcore reads up to 2; resume with the version that wrote it"],
    "arrays": ["state.safetensors is truncated or damaged", *OLDER],
    "no_arrays": ["state.safetensors is truncated or damaged", *OLDER],
    "common": ["common.pt is truncated or damaged", *OLDER],
    "no_common": ["common.pt is truncated or damaged", *OLDER],
    "metadata_json": ["metadata.json is truncated or damaged: Expecting value", *OLDER],
    "metadata_list": ["metadata.json is truncated or damaged: it does not say sharded_backend torch_dist", *OLDER],
    "metadata": [".metadata cannot be read", *OLDER],
    "no_metadata": [".metadata cannot be read", *OLDER],
    "no_shard": [".distcp is missing", *OLDER],
    "half_shard": ["__1_0.distcp is truncated", *OLDER],
    "evil_metadata": [".metadata cannot be read: it wants posix.mkdir, which no checkpoint metadata needs", *OLDER],
    "evil_common": ["common.pt is truncated or damaged: it is no pickle of plain values", *OLDER],
    "old_and_wrong": [
        "has no format number",
        "parallel.pipeline_parallel 2, and so its optimizer state is wrong; its weights are right: start a new run from",
    ],
    "untied": [
        "tied is False there and True here",
        "architecture is 'Qwen2ForCausalLM' there and 'LlamaForCausalLM' here",
    ],
    "reference": ["holds no reference policy", "algo.kl.coef is 0.1"],
}


def numbered_and_not(layout: Any, mesh: Mesh, good: Path, folder: Path) -> dict[str, Any]:
    """A checkpoint of an earlier version whose optimizer state is right is read as it always was."""
    now, before = build_actor(settings(mesh), layout), build_actor(settings(mesh), layout)
    path = folder / "checkpoints" / "step_000002"
    shutil.copytree(good, path)
    unnumbered(path)
    load_checkpoint(good, now, layout)
    load_checkpoint(path, before, layout)
    steps = [actor.optimizer.adam_step for actor in (now, before)]
    return {"steps": steps, "different": differences(layout, local_state(now), local_state(before))}


@pytest.fixture(scope="module")
def single_process_run(tensor_parallel_run: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return spawn(in_one_process, Mesh(), str(tmp_path_factory.mktemp("single")), tensor_parallel_run["path"])


def test_resume_is_bitwise_with_the_plain_optimizer(single_process_run: dict[str, Any]) -> None:
    check_resumed(single_process_run["plain"])


def test_a_tensor_parallel_checkpoint_continues_in_one_process(single_process_run: dict[str, Any]) -> None:
    found = single_process_run["reshard"]
    assert found["trace"] == pytest.approx(found["expected"], rel=1e-6)
    assert found["worst"] < 1e-6
    assert found["tensors"] == 4 * 12 + 3


def test_a_checkpoint_before_the_first_gradient_step(single_process_run: dict[str, Any]) -> None:
    for found in single_process_run["first_step"]:
        assert found["saved"] == found["resumed"] == found["expected"]
        assert found["different"] == []


def test_saving_leaves_no_process_behind(single_process_run: dict[str, Any]) -> None:
    assert single_process_run["helpers"] == []


def test_the_configuration_decides_rates_and_the_checkpoint_the_position(single_process_run: dict[str, Any]) -> None:
    assert single_process_run["settings"] == pytest.approx([5e-4 * 3 / 8, 0.25], rel=1e-12)


def test_the_newest_checkpoints_are_kept_and_unfinished_ones_ignored(single_process_run: dict[str, Any]) -> None:
    unfinished = "step_000099.partial"
    assert single_process_run["kept"] == [
        ["step_000002", "step_000004.partial", unfinished],
        ["step_000002", "step_000004", unfinished],
        ["step_000002", "step_000004", unfinished],
        ["step_000004", unfinished, "step_1000000"],
        ["config.json", "megatron", "state.json", "state.safetensors"],
        ["config.json", "megatron", "state.json", "state.safetensors"],
        "step_1000000",
    ]


@pytest.mark.parametrize(("case", "parts"), ERRORS.items(), ids=list(ERRORS))
def test_errors_say_what_is_wrong(single_process_run: dict[str, Any], case: str, parts: list[str]) -> None:
    assert all(part in single_process_run["errors"][case] for part in parts), single_process_run["errors"][case]


def test_nothing_in_a_checkpoint_is_executed(single_process_run: dict[str, Any]) -> None:
    assert single_process_run["errors"]["ran"] == []


def test_an_unnumbered_checkpoint_is_read(single_process_run: dict[str, Any]) -> None:
    assert single_process_run["unnumbered"] == {"steps": [2.0, 2.0], "different": []}


def test_no_checkpoint_in_a_new_or_unfinished_run(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints" / "step_000003.partial").mkdir(parents=True)
    assert latest_checkpoint(tmp_path) is None


def test_the_state_file_is_readable_json(tensor_parallel_run: dict[str, Any]) -> None:
    stored = json.loads((Path(tensor_parallel_run["path"]) / "state.json").read_text())
    assert stored["train"]["loader"] == STATE.loader
    assert stored["fits"]["hidden_size"] == 64
