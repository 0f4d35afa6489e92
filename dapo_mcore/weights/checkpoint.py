"""Checkpoints: all that a run needs to go on as if it had never stopped.

Change here: what a checkpoint holds, where its files lie, how many are kept.

    run_dir/checkpoints/step_000012/
        megatron/           policy, optimizer, schedule, reference policy: megatron-core's distributed checkpoint
        config.json …       the model's configuration and tokenizer: tools/convert.py makes an HF folder of the whole
        state.json          counters, data position, configuration, the model's sizes
        state.safetensors   token data of carried groups

Tensors are stored in the model's own shapes, so a run may resume on another mesh. No random state is stored: dropout is
off, and the seeds of sampling derive from (config.seed, step).
"""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from dapo_mcore.actor.actor import Actor
from dapo_mcore.actor.layout import Layout
from dapo_mcore.errors import CheckpointError
from dapo_mcore.weights.hf_io import write_model_files
from dapo_mcore.weights.megatron_io import MEGATRON

_JSON, _ARRAYS = "state.json", "state.safetensors"
_FILES = (f"{MEGATRON}/metadata.json", f"{MEGATRON}/.metadata", f"{MEGATRON}/common.pt", _JSON, _ARRAYS)


@dataclass(frozen=True, slots=True)
class TrainState:
    """Where a run stands, apart from its tensors.

    step            rollout steps done.
    num_updates     gradient steps done.
    weight_version  version of the weights that the engines held.
    loader          PromptLoader.state(): {epoch: 0, offset: 512}.
    sampler, sampler_arrays   Sampler.state(): the carried groups. The arrays are read on rank 0 alone, empty elsewhere.
    config          the configuration as YAML, for people to compare.
    """

    step: int
    num_updates: int
    weight_version: int
    loader: dict[str, Any]
    sampler: dict[str, Any]
    sampler_arrays: dict[str, np.ndarray]
    config: str


def save_checkpoint(run_dir: Path, actor: Actor, state: TrainState | None, layout: Layout, keep: int) -> Path:
    """The folder of the checkpoint that was written; `state` comes from rank 0, the others give None.

    The folder gets its name once everything in it is on disk; then all but the newest `keep` checkpoints are deleted.
    Collectives: every rank must call it. All ranks must see `run_dir`.
    """
    step = layout.broadcast_object(state.step if state is not None else None)
    folder = run_dir / "checkpoints" / f"step_{step:06d}"
    partial = folder.with_name(folder.name + ".partial")
    layout.controller_first(lambda: _make_empty(partial / MEGATRON))
    _collect_results_in_process()
    dist_checkpointing.save(_sharded_state(actor, loading=False), str(partial / MEGATRON))
    layout.controller_first(lambda: _finish(partial, folder, state, actor, keep))
    return folder


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The whole checkpoint with the highest step, if there is one. Ranks may see a shared disk differently: ask rank 0."""
    return next(reversed(_checkpoints(run_dir)), None)


def step_of(path: Path) -> int:
    """Rollout steps done in a checkpoint, by its name."""
    return int(path.name.removeprefix("step_"))


def load_checkpoint(path: Path, actor: Actor, layout: Layout) -> TrainState:
    """Puts the checkpoint's tensors into `actor`; where the run stood, on every rank (the sampler's arrays on rank 0).

    The actor's mesh may differ from the one that saved. Raises CheckpointError for a missing or incomplete folder, and
    for a model or optimizer that the checkpoint does not fit. Collectives: every rank must call it.
    """
    _check_complete(path)
    stored = _read_json(path / _JSON)
    _check_fits(path, stored, actor)
    arrays = _read_arrays(path / _ARRAYS) if layout.is_controller else {}
    try:
        tensors = dist_checkpointing.load(_sharded_state(actor, loading=True), str(path / MEGATRON))
    except (CheckpointingException, CheckpointException, OSError) as error:
        raise CheckpointError(f"{path / MEGATRON} cannot be read: {error}; resume from an older checkpoint") from error
    actor.policy.load_state_dict(tensors["policy"])
    if actor.reference is not None:
        actor.reference.load_state_dict(tensors["reference"])
    actor.optimizer.load_state(tensors["optimizer"])
    actor.num_updates = actor.optimizer.scheduler.num_steps
    return TrainState(**stored["train"], sampler_arrays=arrays)


def _sharded_state(actor: Actor, *, loading: bool) -> dict[str, Any]:
    """The tensors of this rank as megatron-core's checkpoint sees them. `fully_reshardable` fits any later mesh."""
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }
    policy = actor.policy.sharded_state_dict(metadata=metadata)
    state = {"policy": policy, "optimizer": actor.optimizer.sharded_state(policy, metadata, loading=loading)}
    if actor.reference is not None:
        state["reference"] = actor.reference.sharded_state_dict(metadata=metadata)
        add_prefix_for_sharding(state["reference"], "reference.")
    return state


def _collect_results_in_process() -> None:
    """Spares every rank a helper process that upstream (0.16.1) starts at the first save, to hold the queue of results.

    It imports the whole program anew (seconds, hundreds of MB). Only asynchronous saving needs it; ours is synchronous.
    """
    filesystem_async._results_queue = filesystem_async._results_queue or queue.Queue()


def _finish(partial: Path, folder: Path, state: TrainState | None, actor: Actor, keep: int) -> None:
    """Rank 0: writes the run's state, makes the checkpoint visible, deletes old ones."""
    assert state is not None, "rank 0 must give the state"
    train = {name: getattr(state, name) for name in TrainState.__dataclass_fields__ if name != "sampler_arrays"}
    stored = {"train": train, "fits": _traits(actor), "reference": actor.reference is not None}
    (partial / _JSON).write_text(json.dumps(stored, indent=2), encoding="utf-8")
    safetensors.numpy.save_file(state.sampler_arrays, partial / _ARRAYS)
    write_model_files(partial, actor.hf_config, actor.policy.config.params_dtype, Path(actor.config.model.path))
    for path in (partial / _JSON, partial / _ARRAYS, partial / MEGATRON, partial):
        _sync_to_disk(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    _sync_to_disk(folder.parent)
    others = [path for path in _checkpoints(folder.parents[1]) if path != folder]
    for old in others[: max(0, len(others) + 1 - keep)]:
        shutil.rmtree(old)


def _traits(actor: Actor) -> dict[str, Any]:
    """What a checkpoint and the run that loads it must have in common. The mesh is not among it."""
    shape = asdict(actor.shape)
    del shape["padded_vocab_size"]
    return shape | {
        "moe_layers": list(actor.shape.moe_layers),  # as JSON gives it back
        "model.dtype": actor.config.model.dtype,
        "optimizer.distributed": actor.config.optimizer.distributed,
    }


def _check_complete(path: Path) -> None:
    missing = [name for name in _FILES if not (path / name).is_file()]
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}")
    if missing:
        raise CheckpointError(
            f"{path} is not a whole checkpoint: it lacks {', '.join(missing)}; resume from an older one"
        )


def _check_fits(path: Path, stored: dict[str, Any], actor: Actor) -> None:
    own, theirs = _traits(actor), stored["fits"]
    wrong = [
        f"{name} is {theirs.get(name)!r} there and {own[name]!r} here" for name in own if theirs.get(name) != own[name]
    ]
    if wrong:
        raise CheckpointError(
            f"{path} does not fit this run: {'; '.join(wrong)}; restore the setting, or start a new run from an export"
        )
    if actor.reference is not None and not stored["reference"]:
        raise CheckpointError(
            f"{path} holds no reference policy, but algo.kl.coef is {actor.config.algo.kl.coef}; "
            f"the run it comes from had algo.kl.coef 0: set it to 0, or start a new run"
        )


def _checkpoints(run_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest step first. A `.partial` folder is one that was never finished."""
    folder = run_dir / "checkpoints"
    found = [path for path in folder.iterdir() if re.fullmatch(r"step_\d{6,}", path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is broken: {error}; resume from an older checkpoint") from error


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or broken: {error}; resume from an older checkpoint") from error


def _sync_to_disk(path: Path) -> None:
    """Flushes a file, or a folder's entries, so that the rename cannot reach the disk before them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
