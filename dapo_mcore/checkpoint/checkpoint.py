"""Checkpoints: all that a run needs to continue as if it had never stopped.

Change here: what a checkpoint holds, and how it is written and read.

    run_dir/checkpoints/step_000012/
        shards/             policy, critic, optimizers, reference policy: a safetensors file of each rank, and their index
        config.json …       the model's configuration and tokenizer: tools/convert.py makes an HF folder of the whole
        state.json          counters, data position, configuration, the model's sizes
        state.safetensors   token data of carried groups
        manifest.json       size and hash of each file

Tensors are stored in the model's own shapes, so a run may resume on another mesh. Every rank writes and reads its own blocks;
megatron-core only says which they are. Nothing in a checkpoint is executed, and any supported version reads what another one
wrote. Checkpoints of formats 1 and 2 are read too; they have `megatron/`, a distributed checkpoint in megatron-core's format.
No random state is stored: dropout is off, and the seeds of sampling derive from (config.seed, step).
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from dapo_mcore.actor.actor import Actor
from dapo_mcore.actor.checkpoint_blocks import (
    CheckpointBlock,
    checkpoint_blocks,
    exchange_shares,
    shares,
    written_blocks,
)
from dapo_mcore.actor.not_finite import all_finite
from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.actor.update_guard import GuardState
from dapo_mcore.algo.adaptive_entropy import EntropyCoef
from dapo_mcore.checkpoint.best import Best
from dapo_mcore.checkpoint.publish import Publication, publish
from dapo_mcore.checkpoint.run_folder import checkpoint_path, latest_checkpoint, new_partial, remove, step_of
from dapo_mcore.checkpoint.run_state import FORMAT, RunState, TrainState, write_state
from dapo_mcore.checkpoint.shard_file import write_shard
from dapo_mcore.checkpoint.snapshot import Snapshot
from dapo_mcore.checkpoint.stored import VISIBLE_S, open_visible, read_stored, unreadable_named
from dapo_mcore.errors import CheckpointError, DamagedCheckpoint, DapoError, TrainingError
from dapo_mcore.model_files.megatron_folder import Store, open_store
from dapo_mcore.model_files.model_folder import side_files_folder
from dapo_mcore.model_files.shard_format import SHARDS
from dapo_mcore.model_files.shard_reader import Wanted
from dapo_mcore.model_files.side_files import write_model_files

T = TypeVar("T")

_REMEDIES = {
    errno.ENOSPC: "free some space on its disk",
    errno.EDQUOT: "free some of your quota there",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
}
"""What to do, by the number of the system's error."""


def save_checkpoint(
    run_dir: Path,
    actor: Actor,
    state: TrainState | None,
    layout: Layout,
    keep: int | None,
    warn: Callable[[str], None] = print,
    best: Best | None = None,
) -> Path:
    """Write a checkpoint and return its folder; `state` comes from rank 0, the others give None.

    The folder gets its name once everything in it is on disk; then all but the newest `keep` checkpoints (None: all) and the `best` are
    deleted, and `warn` is told of any that cannot be. Raises CheckpointError where the disk does not take it, and TrainingError if a
    tensor on any rank is not finite; the checkpoints before stay whole. Collectives: every rank must call it. All ranks must see
    `run_dir`.
    """
    job, blocks = begin_checkpoint(run_dir, actor, state, layout, keep, best)
    try:
        with _disk_errors_named(job.folder):
            layout.on_every_rank_or_raise(lambda: _write_own(job, blocks, layout.rank))
            _on_controller(layout, lambda: publish(job, warn, _patience(job.partial)))
    except DapoError:
        abandon(job, layout)
        raise
    return job.folder


def begin_checkpoint(
    run_dir: Path, actor: Actor, state: TrainState | None, layout: Layout, keep: int | None, best: Best | None = None
) -> tuple[Publication, list[CheckpointBlock]]:
    """Make the folder of a checkpoint and write what is no tensor. Return what is to be published, and this rank's blocks.

    Raise as save_checkpoint does; nothing is left then. Collectives: every rank must call it.
    """
    folder = checkpoint_path(run_dir, layout.broadcast_object(state.step if state is not None else None))
    blocks = checkpoint_blocks(actor)
    layout.on_every_rank_or_raise(lambda: _check_finite(folder, blocks, layout.rank))
    optimizers = [actor.optimizer, *([actor.critic.optimizer] if actor.critic else [])]
    own = torch.tensor([optimizer.adam_step for optimizer in optimizers], dtype=torch.float64)
    steps = layout.max_over_ranks(own).tolist()
    with _disk_errors_named(folder):
        partial: Any = layout.broadcast_object(_on_controller(layout, lambda: new_partial(folder)))
    job = Publication(partial, folder, layout.world_size, keep, best)
    try:
        with _disk_errors_named(folder):
            _on_controller(layout, lambda: _write_rest(partial, state, steps, actor))
    except DapoError:
        abandon(job, layout)
        raise
    return job, blocks


def abandon(job: Publication, layout: Layout) -> None:
    """Delete what was written for a checkpoint that will not be published."""
    if layout.is_controller:
        with suppress(OSError):
            remove(job.partial)


def load_checkpoint(path: Path, actor: Actor, layout: Layout) -> TrainState:
    """Load the checkpoint's tensors into `actor`; return where the run stood, on every rank (the sampler's arrays on rank 0).

    The actor's mesh may differ from the one that saved. Raises DamagedCheckpoint, on every rank, for a missing or damaged file,
    and CheckpointError for a model that the checkpoint does not fit. Ranks that hold the same blocks share the reading.
    Collectives: every rank must call it; then broadcasts over the groups of such ranks.
    """
    state = _on_every_rank(layout, lambda: _read_state(path, actor) if layout.is_controller else None)
    told = replace(state, train=replace(state.train, sampler_arrays={})) if state else None
    shared: Any = layout.broadcast_object(told)
    blocks = checkpoint_blocks(actor)
    _on_every_rank(layout, lambda: _read_blocks(path, shares(blocks)))
    exchange_shares(blocks, layout)
    actor.optimizer.resume_at(shared.adam_step)
    actor.guard.state = GuardState(**(shared.guard or {"num_updates": shared.train.num_updates}))
    if actor.critic is not None:
        actor.critic.optimizer.resume_at(shared.critic["adam_step"])
        actor.critic.guard.state = GuardState(**shared.critic["guard"])
    if actor.config.algo.adaptive_entropy is not None and shared.entropy_coef is not None:
        actor.entropy_coef = EntropyCoef(**shared.entropy_coef)
    return (state or shared).train


def _on_controller(layout: Layout, action: Callable[[], T]) -> T | None:
    return layout.on_controller_or_raise(lambda: action() if layout.is_controller else None)


def _on_every_rank(layout: Layout, action: Callable[[], T]) -> T | None:
    """Call `action` and return its result. If any rank finds damage, every rank raises DamagedCheckpoint."""

    def find_damage() -> tuple[T | None, str | None]:
        try:
            return action(), None
        except DamagedCheckpoint as error:
            return None, str(error)

    result, damage = layout.on_every_rank_or_raise(find_damage)
    found = [message for message in layout.gather_objects(damage) if message]
    if message := layout.broadcast_object(next(iter(found), None)):
        raise DamagedCheckpoint(str(message))
    return result


def _patience(partial: Path) -> Callable[[], None]:
    """Return a function that raises CheckpointError once rank 0 has waited too long for files that other ranks have written."""
    start = time.monotonic()

    def check() -> None:
        if time.monotonic() - start > VISIBLE_S:
            raise CheckpointError(
                f"rank 0 does not see all shards in {partial} {VISIBLE_S:.0f} s after all ranks have written theirs: put "
                f"output_dir on a disk that every node shares"
            )

    return check


def _check_finite(folder: Path, blocks: Sequence[CheckpointBlock], rank: int) -> None:
    """Raise TrainingError for a block with NaN or infinity. One host wait for each device if there is none."""
    if all_finite(block.data for block in blocks):
        return
    bad = [block.key for block in blocks if not block.data.isfinite().all()]
    before = latest_checkpoint(folder.parents[1])
    raise TrainingError(
        f"{folder.name} was not saved: {len(bad)} tensors on rank {rank} hold NaN or infinity, first {bad[0]}; "
        + (f"{before} is the last good checkpoint and stays" if before else "there is no checkpoint before it")
        + "; lower optimizer.lr or optimizer.clip_grad, and start again"
    )


def _write_own(job: Publication, blocks: Sequence[CheckpointBlock], rank: int) -> None:
    """Write what is this rank's to write, into a file of its own."""
    with _disk_errors_named(job.folder):
        snapshot = Snapshot(written_blocks(blocks))
        write_shard(job.partial / SHARDS, rank, snapshot.header, snapshot.slices, snapshot.pieces)


def _write_rest(partial: Path, state: TrainState | None, adam_steps: Sequence[float], actor: Actor) -> None:
    """Rank 0: write what is no tensor. adam_steps  of the policy's optimizer, and of the critic's if there is one."""
    assert state is not None, "rank 0 must give the state"
    (partial / SHARDS).mkdir()
    guard, critic = asdict(actor.guard.state), None
    if actor.critic is not None:
        critic = {"adam_step": adam_steps[1], "guard": asdict(actor.critic.guard.state)}
    entropy_coef = None if actor.config.algo.adaptive_entropy is None else asdict(actor.entropy_coef)
    has_reference = actor.reference is not None
    write_state(
        partial, RunState(FORMAT, state, _traits(actor), has_reference, adam_steps[0], guard, critic, entropy_coef)
    )
    write_model_files(partial, actor.hf_config, actor.policy.config.params_dtype, side_files_folder(actor.config.model))


def _read_state(path: Path, actor: Actor) -> RunState:
    """Rank 0: check all that is no tensor, and that the files of tensors are there. Return the state."""
    state = read_stored(path)
    with unreadable_named(path):
        open_store(path)
    _check_fits(path, state, actor)
    return state


def _read_blocks(path: Path, blocks: Sequence[CheckpointBlock]) -> None:
    """Fill the blocks, in place."""
    with unreadable_named(path), torch.no_grad():
        store = open_visible(path)
        # in the order of the stored tensors: the reader of old formats keeps the chunk that it read last
        ordered = sorted(blocks, key=lambda block: (block.key, block.offsets))
        store.fill(wanted for block in ordered for wanted in _wanted(store, block))


def _wanted(store: Store, block: CheckpointBlock) -> Iterator[Wanted]:
    """Yield what is to be read of a block, if anything of it is stored. Padding becomes 0."""
    key = block.key
    if key not in store.tensors:  # format 1 with the plain optimizer
        key = key.replace("optimizer.state.param.", "optimizer.state.fp32_param.")
    if key not in store.tensors:
        raise DamagedCheckpoint(f"{store.folder} has no tensor {block.key}")
    size = store.size(key)
    if size != tuple(block.size) and not (block.is_padded and size[1:] == tuple(block.size[1:])):
        raise DamagedCheckpoint(f"{store.folder}: {key} is {list(size)} and not {list(block.size)}")
    rows = max(0, min(block.data.shape[0], size[0] - block.offsets[0]))
    block.data[rows:] = 0
    if rows:
        yield key, block.offsets, block.data[:rows]


def _traits(actor: Actor) -> dict[str, Any]:
    """Return the settings that must match between a checkpoint and the run that loads it."""
    shape = asdict(actor.shape)
    del shape["padded_vocab_size"]
    return shape | {
        "moe_layers": list(actor.shape.moe_layers),  # as JSON gives it back
        "model.dtype": actor.config.model.dtype,
    }


def _check_fits(path: Path, state: RunState, actor: Actor) -> None:
    own, theirs = _traits(actor), state.fits
    wrong = [
        f"{name} is {theirs.get(name)!r} there and {own[name]!r} here" for name in own if theirs.get(name) != own[name]
    ]
    if wrong:
        raise CheckpointError(
            f"{path} does not fit this run: {'; '.join(wrong)}; restore the setting, or start a new run from an export"
        )
    if actor.reference is not None and not state.reference:
        raise CheckpointError(
            f"{path} holds no reference policy, but algo.kl.coef is {actor.config.algo.kl.coef}; "
            f"the run it comes from had algo.kl.coef 0: set it to 0, or start a new run"
        )
    if actor.critic is not None and state.critic is None:
        raise CheckpointError(
            f"{path} holds no critic, but algo.advantage is gae; the run it comes from had algo.advantage group: set that, or start a "
            f"new run from an export"
        )


@contextmanager
def _disk_errors_named(folder: Path) -> Iterator[None]:
    """Turn the system's refusal to write into one line that says what to do."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno, "make it writable")
        before = latest_checkpoint(folder.parents[1], before=step_of(folder))
        goes_on = f"it goes on from {before}" if before else "there is no checkpoint before it to go on from"
        raise CheckpointError(
            f"the checkpoint {folder} cannot be written: {error.strerror or error}; {remedy} and start again: {goes_on}"
        ) from error
