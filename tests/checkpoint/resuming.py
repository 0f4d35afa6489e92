"""Workers of test_checkpoint.py: each saves, damages or resumes in real gloo processes and returns what it found."""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dapo_mcore.checkpoint import saves as saves_module
from dapo_mcore.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from dapo_mcore.checkpoint.resume import load_resumed
from dapo_mcore.checkpoint.run_folder import latest_checkpoint
from dapo_mcore.checkpoint.run_state import TrainState
from dapo_mcore.checkpoint.saves import Saves
from dapo_mcore.errors import CheckpointError, DapoError
from dapo_mcore.model_files.hf_folder import RandomReader
from dapo_mcore.model_files.safetensors_file import DTYPES
from dapo_mcore.model_files.shard_reader import ShardReader
from tests.actor.parity import Mesh, gather_named, hf_config, make_batch, make_config, scored_step, shared_step
from tests.checkpoint.stored_checkpoint import as_format_2, cut_chunks, evil_common, evil_metadata, flip, unnumbered

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
    """Return a fresh actor. 65 words are padded to 80 on two tensor-parallel ranks, to 72 on one."""
    from dapo_mcore.actor.actor import Actor

    model = hf_config(family, tied)
    model.vocab_size = 65
    return Actor(config, model, layout, RandomReader(model, seed=0))


def train(actor: Any, num_updates: int) -> list[float]:
    """Take gradient steps and return their gradient norms and learning rates."""
    mini_batches = shared_step(actor.config, actor.layout, make_batch(), actor)
    updates = [actor.update(mini_batches[0]) for _ in range(num_updates)]
    return [value for update in updates for value in (update.grad_norm, update.lr)]


def local_state(actor: Any) -> dict[str, torch.Tensor]:
    """Return a copy of every tensor of this rank that training changes."""
    found = {}
    optimizers = [actor.optimizer, *([actor.critic.optimizer] if actor.critic else [])]
    for (model, trained), optimizer in zip(actor.trained.items(), optimizers, strict=True):
        found |= {f"{model}.{name}": p.detach() for name, p in trained.named_weights()}
        prefix = "" if model == "policy" else f"{model}."
        for part in optimizer.megatron.chained_optimizers:
            parameters = [p for group in part.optimizer.param_groups for p in group["params"]]
            for index, parameter in enumerate(parameters):
                found[f"{prefix}master.{index}"] = parameter.detach()
                found |= {f"{prefix}{key}.{index}": value for key, value in part.optimizer.state[parameter].items()}
    return {name: tensor.clone() for name, tensor in found.items()}


def rounded_masters(actor: Any) -> bool:
    """Return True if each weight has, on this rank, the bits of its fp32 master in the model's dtype."""
    shards = [shard for shard in actor.optimizer.shards() if "param" in shard.state]
    return bool(shards or actor.policy.config.params_dtype == torch.float32) and all(
        torch.equal(
            shard.parameter.detach().flatten().narrow(0, shard.start, master.numel()), master.to(shard.parameter.dtype)
        )
        for shard in shards
        for master in [shard.state["param"]]
    )


def differences(layout: Any, ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors that are not bitwise equal, over all ranks."""
    assert ours.keys() == theirs.keys() and any(name.startswith("exp_avg_sq") for name in ours)
    here = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    return [f"rank {rank}: {name}" for rank, found in enumerate(everyone(layout, here)) for name in found]


def settings(mesh: Mesh, **overrides: Any) -> Any:
    """Return a configuration whose warm-up is longer than the run, so that every step has its own learning rate."""
    return make_config(mesh, optimizer__warmup_updates=8, **overrides)


def interrupt_and_resume(layout: Any, mesh: Mesh, folder: str, options: dict[str, Any], tied: bool) -> dict[str, Any]:
    """Take two steps, save, take two more; then load the checkpoint into a fresh actor and repeat the last two."""
    config = settings(mesh, **options)
    actor = build_actor(config, layout, tied=tied)
    train(actor, 2)
    actor.freeze_reference()  # the reference differs from the start weights: only the checkpoint has it
    path = save_checkpoint(Path(folder), actor, STATE if layout.is_controller else None, layout, keep=2)
    saved = {name: p.detach().clone() for name, p in actor.policy.named_weights()}
    expected = train(actor, 2)
    resumed = build_actor(config, layout, tied=tied)
    state = load_checkpoint(path, resumed, layout)
    loaded = {name: p.detach().clone() for name, p in resumed.policy.named_weights()}
    found = train(resumed, 2)
    weights = gather_named(resumed, dict(resumed.policy.named_weights()))
    if layout.is_controller:
        np.savez(
            Path(folder) / "after.npz", trace=found, **{name: t.detach().float().numpy() for name, t in weights.items()}
        )
    return {
        "moved": any(not torch.equal(saved[name], p) for name, p in actor.policy.named_weights()),
        "rounded": rounded_masters(resumed),
        "loaded": all(torch.equal(saved[name], loaded[name]) for name in saved),
        "expected": expected,
        "found": found,
        "different": differences(layout, local_state(actor), local_state(resumed)),
        "updates": resumed.num_updates,
        "state": [state.step, state.weight_version, state.loader, state.sampler, state.config],
        "arrays": {name: [str(a.dtype), a.tobytes().hex()] for name, a in state.sampler_arrays.items()},
        "path": str(path),
    }


def resume_and_fill_the_disk(layout: Any, mesh: Mesh, folder: str) -> dict[str, Any]:
    found = interrupt_and_resume(layout, mesh, folder, {}, False)
    return found | {
        "full": [a_full_disk(layout, mesh, Path(folder), rank) for rank in range(2)],
        "poisoned": a_poisoned_rank(layout, mesh, Path(folder)),
        "fallback": a_damaged_rank(layout, mesh, Path(folder) / "fallback", Path(found["path"])),
    }


def a_poisoned_rank(layout: Any, mesh: Mesh, run_dir: Path) -> dict[str, Any]:
    """Return both ranks' errors and the remaining folders if one weight of rank 1 is infinite."""
    actor = build_actor(settings(mesh), layout)
    if layout.rank == 1:
        weight = actor.policy[0].get_parameter("decoder.layers.1.self_attention.linear_proj.weight")
        weight.data[0, 0] = torch.inf
    with pytest.raises(DapoError) as caught:
        save_checkpoint(run_dir, actor, replace(STATE, step=3) if layout.is_controller else None, layout, keep=1)
    return {"told": everyone(layout, str(caught.value)), "left": names(run_dir / "checkpoints")}


def a_damaged_rank(layout: Any, mesh: Mesh, run_dir: Path, good: Path) -> dict[str, Any]:
    """Load from a run whose newest checkpoint is damaged where rank 1 alone reads."""
    if layout.is_controller:
        for step in (2, 3):
            shutil.copytree(good, run_dir / "checkpoints" / f"step_{step:06d}")
        flip("shards/rank_00001.safetensors", -1000)(run_dir / "checkpoints" / "step_000003")
    layout.barrier()
    config = settings(mesh, output_dir=str(run_dir.parent), name=run_dir.name)
    actor, expected = build_actor(config, layout), build_actor(config, layout)
    lines: list[str] = []
    path, state = load_resumed(config, actor, layout, lines.append)
    load_checkpoint(good, expected, layout)
    return {
        "resumed": [path.name, state.step],
        "lines": lines,
        "left": names(run_dir / "checkpoints"),
        "different": differences(layout, local_state(actor), local_state(expected)),
    }


def everyone(layout: Any, value: Any) -> list[Any]:
    found: list[Any] = [None] * layout.world_size
    torch.distributed.all_gather_object(found, value, group=layout.control_group)
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def resume_and_save_beside_training(layout: Any, mesh: Mesh, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    found = interrupt_and_resume(layout, mesh, folder, options, False)
    return found | {
        "read": bytes_read(layout, mesh, Path(found["path"]), options),
        "beside": beside_training(layout, mesh, Path(folder) / "beside", options),
    }


def resume_adaptive_entropy(layout: Any, mesh: Mesh, folder: str) -> dict[str, Any]:
    """Train three rollout steps, and the last of them again from the checkpoint before it."""
    from dapo_mcore.actor.learner import Learner

    entropy = {"target": 100.0, "delta": 1e-3, "max_coef": 0.01}
    config = settings(mesh, algo__adaptive_entropy=entropy, algo__entropy_coef=1e-3)

    def train_step(actor: Any, step: int) -> Any:
        scored = scored_step(config, layout, make_batch(), actor)
        Learner(actor, pad_token=0).train(scored, step)
        return [scored.metrics["actor/entropy_coef"], actor.entropy_coef.value, actor.head.objective.entropy_coef]

    actor, fresh = build_actor(config, layout), build_actor(config, layout)
    coefs = [train_step(actor, step)[1] for step in (1, 2)]
    path = save_checkpoint(Path(folder), actor, STATE, layout, keep=1)
    expected = train_step(actor, 3)
    load_checkpoint(path, fresh, layout)
    resumed = train_step(fresh, 3)
    return {
        "coefs": [*coefs, expected[1]],
        "expected": [expected],
        "resumed": [resumed],
        "metric": resumed[0],
        "different": differences(layout, local_state(actor), local_state(fresh)),
    }


def bytes_read(layout: Any, mesh: Mesh, path: Path, options: dict[str, Any]) -> dict[str, int]:
    """Return the bytes of tensors that all ranks read for a load, and those that there are."""
    actor, counted, preadv = build_actor(settings(mesh, **options), layout), [], os.preadv

    def count(*arguments: Any) -> int:
        counted.append(preadv(*arguments))
        return counted[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", count)
        load_checkpoint(path, actor, layout)
    stored = [
        math.prod(part.sizes) * DTYPES[tensor.dtype].itemsize
        for tensor in ShardReader(path / "shards").tensors.values()
        for part in tensor.slices
    ]
    return {"read": sum(everyone(layout, sum(counted))), "stored": sum(stored)}


def beside_training(layout: Any, mesh: Mesh, run_dir: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Save beside training: once undisturbed but for a process that starts late, then with each kind of failure."""
    actor, fresh = (build_actor(settings(mesh, **options), layout) for _ in range(2))
    train(actor, 1)
    lines: list[str] = []
    saves = Saves(run_dir, layout, 2, lines.append, background=True)
    first = saves.pid

    def save(step: int, *, stopped: bool = False) -> Path:
        if stopped:
            os.kill(saves.pid, signal.SIGSTOP)
        return saves.save(actor, replace(STATE, step=step) if layout.is_controller else None, wait=False)

    path, expected = save(2, stopped=True), local_state(actor)
    train(actor, 2)
    before = path.exists()
    os.kill(saves.pid, signal.SIGCONT)
    saves.finish()
    load_checkpoint(path, fresh, layout)
    found = {"before": before, "torn": differences(layout, local_state(fresh), expected)}

    save(3, stopped=True)
    if layout.rank == 1:
        os.kill(saves.pid, signal.SIGKILL)
    else:
        os.kill(saves.pid, signal.SIGCONT)
    path = save(4)
    found["killed"] = {"lines": lines[:], "whole": path.exists(), "in_flight": saves.in_flight}

    if layout.rank == 0:
        resource.prlimit(saves.pid, resource.RLIMIT_FSIZE, (10_000, 10_000))
    save(5)
    found["full"] = {"told": everyone(layout, saves.finish()), "left": names(run_dir / "checkpoints")}

    save(6, stopped=layout.rank == 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saves_module, "STALL_S", 1.0)
        found["stalled"] = {"told": everyone(layout, saves.finish()), "left": names(run_dir / "checkpoints")}

    save(7)
    saves.close()
    saves.close()
    layout.barrier()
    found["left"] = names(run_dir / "checkpoints")
    found["ended"] = [not Path(f"/proc/{pid}").exists() for pid in (first, saves.pid)]
    return found


def a_full_disk(layout: Any, mesh: Mesh, run_dir: Path, full: int) -> dict[str, Any]:
    """Return both ranks' errors and the remaining folders if rank `full` can write at most 10 kB into a file."""
    actor = build_actor(settings(mesh), layout)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if layout.rank == full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(DapoError) as caught:
            save_checkpoint(run_dir, actor, replace(STATE, step=3) if layout.is_controller else None, layout, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return {"told": everyone(layout, str(caught.value)), "left": names(run_dir / "checkpoints")}


def in_one_process(layout: Any, mesh: Mesh, folder: str, tensor_parallel_path: str) -> dict[str, Any]:
    """Run all checks that one process can make, with the plain optimizer and a checkpoint of two tensor-parallel ranks."""
    base = Path(folder)
    return {
        "plain": interrupt_and_resume(layout, mesh, folder, {"optimizer__distributed": False}, False),
        "fp8": resume_in_fp8(layout, mesh, base / "fp8"),
        "reshard": reshard(layout, mesh, Path(tensor_parallel_path)),
        "first_step": [before_the_first_step(layout, mesh, base / str(own), own) for own in (True, False)],
        "settings": changed_settings(layout, mesh, Path(tensor_parallel_path)),
        "helpers": [process.name for process in multiprocessing.active_children()],
        "durable": durable(layout, mesh, base / "durable"),
        "kept": retention(layout, mesh, base / "retention"),
        "errors": errors(layout, mesh, Path(tensor_parallel_path), base / "damaged"),
        "old": [
            new_and_old(layout, mesh, Path(tensor_parallel_path), base / "old" / str(format), format)
            for format in (2, 1)
        ],
    }


def resume_in_fp8(layout: Any, mesh: Mesh, folder: Path) -> dict[str, Any]:
    options = {"model__dtype": "bf16", "model__fp8": {"recipe": "blockwise"}, "batch__max_tokens": 400}
    found = interrupt_and_resume(layout, mesh, str(folder), options, False)
    plain = build_actor(settings(mesh, **(options | {"model__fp8": None})), layout)
    return found | {"without_fp8": train(plain, 4)[::2]}


def reshard(layout: Any, mesh: Mesh, path: Path) -> dict[str, Any]:
    actor = build_actor(settings(mesh), layout)
    load_checkpoint(path, actor, layout)
    trace = train(actor, 2)
    weights = gather_named(actor, dict(actor.policy.named_weights()))
    after = np.load(path.parents[1] / "after.npz")
    worst = max(np.abs(weights[name].detach().numpy() - after[name]).max() for name in weights)
    return {"trace": trace, "expected": after["trace"].tolist(), "worst": float(worst), "tensors": len(weights)}


def before_the_first_step(layout: Any, mesh: Mesh, folder: Path, distributed: bool) -> dict[str, Any]:
    """Save before any gradient step: the run goes on undisturbed, and a resumed one equals it."""
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
    """Return learning rate and weight decay after a resume with settings that differ from the checkpoint's."""
    actor = build_actor(settings(mesh, optimizer__lr=5e-4, optimizer__weight_decay=0.25), layout)
    load_checkpoint(path, actor, layout)
    train(actor, 1)
    return [actor.optimizer.lr, max(group["weight_decay"] for group in actor.optimizer.megatron.param_groups)]


def durable(layout: Any, mesh: Mesh, folder: Path) -> dict[str, Any]:
    """Return the order in which a save waits for the disk and renames, and the files of the checkpoint."""
    calls: list[str] = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(file: int) -> None:
        calls.append(f"fsync {short(Path(os.readlink(f'/proc/self/fd/{file}')))}")
        fsync(file)

    def record_rename(source: Path, target: Path) -> None:
        calls.append(f"rename {short(source)} → {short(target)}")
        rename(source, target)

    def short(path: Path) -> str:
        return "partial" if path.suffix == ".partial" else path.name

    folder.mkdir()
    (folder / "metrics.jsonl").write_text("{}")
    model = folder / "model"
    model.mkdir()
    (model / "tokenizer.json").write_text("{}")
    actor = build_actor(settings(mesh, model__path=str(model)), layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", record_fsync)
        patch.setattr(os, "rename", record_rename)
        path = save_checkpoint(folder, actor, STATE, layout, keep=1)
    return {"calls": calls, "files": [file.name for file in path.rglob("*")]}


def retention(layout: Any, mesh: Mesh, folder: Path) -> list[Any]:
    """Return the folders after each of four saves with keep=2. The third replaces a step; unfinished ones do not count."""
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
    """Return the message for each kind of damage or misfit. A checkpoint of step 1 lies beside each damaged one."""
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


def new_and_old(layout: Any, mesh: Mesh, good: Path, folder: Path, format: int) -> dict[str, Any]:
    """Load the same checkpoint in the current and in an old format, and compare."""
    now, before = build_actor(settings(mesh), layout), build_actor(settings(mesh), layout)
    path = folder / "checkpoints" / "step_000002"
    shutil.copytree(good, path)
    as_format_2(path)
    if format == 1:
        unnumbered(path)
    load_checkpoint(good, now, layout)
    load_checkpoint(path, before, layout)
    steps = [actor.optimizer.adam_step for actor in (now, before)]
    return {"steps": steps, "different": differences(layout, local_state(now), local_state(before))}


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no_json": lambda path: (path / "state.json").unlink(),
    "no_shard": lambda path: (path / "shards/rank_00000.safetensors").unlink(),
    "half_shard": cut_chunks,
    "bit": flip("shards/rank_00001.safetensors", -1000),
    "header": flip("shards/rank_00000.safetensors", 100),
    "evil_metadata": lambda path: [as_format_2(path), evil_metadata(path)],
    "evil_common": lambda path: [as_format_2(path), evil_common(path)],
}
"""Damage that a load must notice on every rank; test_stored.py has all kinds."""
