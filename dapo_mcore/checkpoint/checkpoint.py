"""Checkpoints: all that a run needs to continue as if it had never stopped.

Change here: what a checkpoint holds, and how it is written and read.

    run_dir/checkpoints/step_000012/
        megatron/           policy, optimizer, reference policy: a distributed checkpoint in megatron-core's format
        config.json …       the model's configuration and tokenizer: tools/convert.py makes an HF folder of the whole
        state.json          counters, data position, configuration, the model's sizes
        state.safetensors   token data of carried groups

Tensors are stored in the model's own shapes, so a run may resume on another mesh. Every rank writes and reads its own blocks
(torch_dist.py); megatron-core only says which they are. So nothing in a checkpoint is ever executed, and any supported
version reads what another one wrote. No random state is stored: dropout is off, and the seeds of sampling derive from
(config.seed, step).
"""

from __future__ import annotations

import errno
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from dapo_mcore.actor.actor import Actor
from dapo_mcore.actor.checkpoint_blocks import CheckpointBlock, checkpoint_blocks
from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.checkpoint.run_folder import (
    checkpoint_path,
    commit,
    drop_old,
    latest_checkpoint,
    make_empty,
    partial_path,
    remove,
    step_of,
)
from dapo_mcore.checkpoint.run_state import FORMAT, RunState, TrainState, write_state
from dapo_mcore.checkpoint.stored import read_stored, unreadable_named
from dapo_mcore.errors import CheckpointError, DamagedCheckpoint, DapoError, TrainingError
from dapo_mcore.model_files.disk import sync_to_disk
from dapo_mcore.model_files.megatron_folder import MEGATRON
from dapo_mcore.model_files.side_files import write_model_files
from dapo_mcore.model_files.torch_dist import DistributedReader, StoredChunk, without_crc, write_chunk, write_metadata
from dapo_mcore.observe.sinks import METRICS_FILE

T = TypeVar("T")


def save_checkpoint(
    run_dir: Path,
    actor: Actor,
    state: TrainState | None,
    layout: Layout,
    keep: int,
    warn: Callable[[str], None] = print,
) -> Path:
    """Write a checkpoint and return its folder; `state` comes from rank 0, the others give None.

    The folder gets its name once everything in it is on disk; then all but the newest `keep` checkpoints are deleted, and
    `warn` is told of any that cannot be. Raises CheckpointError where the disk does not take it, and TrainingError if a tensor on
    any rank is not finite; the checkpoints before stay whole. Collectives: every rank must call it. All ranks must see `run_dir`.
    """
    folder = checkpoint_path(run_dir, layout.broadcast_object(state.step if state is not None else None))
    partial, blocks = partial_path(folder), checkpoint_blocks(actor)
    layout.on_every_rank_or_raise(lambda: _check_finite(folder, blocks, layout.rank))
    try:
        with _disk_errors_named(folder):
            _on_controller(layout, lambda: _make_empty(partial))
            written = layout.on_every_rank_or_raise(
                lambda: _write_blocks(folder, partial / MEGATRON, blocks, layout.rank)
            )
            everyone = layout.gather_objects(written)
            steps = layout.max_over_ranks(torch.tensor(actor.optimizer.adam_step, dtype=torch.float64))
            _on_controller(layout, lambda: _finish(partial, folder, everyone, state, float(steps), actor))
    except DapoError:
        if layout.is_controller:
            with suppress(OSError):
                remove(partial)
        raise
    _on_controller(layout, lambda: drop_old(folder, keep, warn))
    return folder


def load_checkpoint(path: Path, actor: Actor, layout: Layout) -> TrainState:
    """Load the checkpoint's tensors into `actor`; return where the run stood, on every rank (the sampler's arrays on rank 0).

    The actor's mesh may differ from the one that saved. Raises DamagedCheckpoint, on every rank, for a missing or damaged file,
    and CheckpointError for a model that the checkpoint does not fit. Collectives: every rank must call it.
    """
    state = _on_every_rank(layout, lambda: _read_state(path, actor) if layout.is_controller else None)
    told = replace(state, train=replace(state.train, sampler_arrays={})) if state else None
    shared: Any = layout.broadcast_object(told)
    _on_every_rank(layout, lambda: _read_blocks(path, actor))
    actor.optimizer.resume_at(shared.adam_step, shared.train.num_updates)
    actor.num_updates = shared.train.num_updates
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


def _make_empty(partial: Path) -> None:
    make_empty(partial)
    (partial / MEGATRON).mkdir()


Written = tuple[list[StoredChunk], dict[str, tuple[torch.dtype, tuple[int, ...]]]]
"""The places of a rank's chunks, and the dtype and shape of each whole tensor by its key."""


def _check_finite(folder: Path, blocks: Sequence[CheckpointBlock], rank: int) -> None:
    """Raise TrainingError for a block with NaN or infinity. One host wait if there is none."""
    tensors = [block.data for block in blocks if block.data.numel()]
    if torch.nn.utils.get_total_norm(tensors, norm_type=math.inf).isfinite():
        return
    bad = [block.key for block in blocks if not block.data.isfinite().all()]
    before = latest_checkpoint(folder.parents[1])
    raise TrainingError(
        f"{folder.name} was not saved: {len(bad)} tensors on rank {rank} hold NaN or infinity, first {bad[0]}; "
        + (f"{before} is the last good checkpoint and stays" if before else "there is no checkpoint before it")
        + "; lower optimizer.lr or optimizer.clip_grad, and start again"
    )


def _write_blocks(folder: Path, megatron: Path, blocks: Sequence[CheckpointBlock], rank: int) -> Written:
    """Write the blocks that are this rank's to write into a file of its own."""
    blocks = [block for block in blocks if block.is_written]
    name, chunks = f"__{rank}_0.distcp", []
    if blocks:
        with _disk_errors_named(folder), without_crc():
            with open(megatron / name, "wb") as file:
                for block in blocks:
                    sizes = tuple(block.data.shape)
                    chunks.append(write_chunk(file, name, block.key, block.offsets, sizes, block.data.cpu()))
            sync_to_disk(megatron / name)
    return chunks, {block.key: (block.data.dtype, tuple(block.size)) for block in blocks}


def _finish(
    partial: Path, folder: Path, everyone: Sequence[Any], state: TrainState | None, adam_step: float, actor: Actor
) -> None:
    """Rank 0: write what is no tensor, and make the checkpoint visible."""
    assert state is not None, "rank 0 must give the state"
    chunks = [chunk for written, _ in everyone for chunk in written]
    dtypes = {key: dtype for _, kinds in everyone for key, (dtype, _) in kinds.items()}
    sizes = {key: size for _, kinds in everyone for key, (_, size) in kinds.items()}
    _check_covered(chunks, sizes)
    write_metadata(partial / MEGATRON, chunks, dtypes, sizes)
    write_state(partial, RunState(FORMAT, state, _traits(actor), actor.reference is not None, adam_step))
    write_model_files(partial, actor.hf_config, actor.policy.config.params_dtype, Path(actor.config.model.path))
    rows = folder.parents[1] / METRICS_FILE  # a resumed run needs the rows up to here
    for path in (*partial.iterdir(), *([rows] if rows.exists() else [])):
        sync_to_disk(path)
    commit(partial, folder)


def _check_covered(chunks: Sequence[StoredChunk], sizes: dict[str, tuple[int, ...]]) -> None:
    """Stop before a checkpoint with a hole, or with an element twice, is made visible."""
    stored = Counter[str]()
    for chunk in chunks:
        stored[chunk.key] += math.prod(chunk.sizes)
    wrong = [
        f"{key}: {stored[key]} of {math.prod(size)}" for key, size in sizes.items() if stored[key] != math.prod(size)
    ]
    assert not wrong, f"elements written, of those there are: {'; '.join(wrong[:5])}"


def _read_state(path: Path, actor: Actor) -> RunState:
    """Rank 0: check all that is no tensor, and return it."""
    state = read_stored(path)
    _check_fits(path, state, actor)
    return state


def _read_blocks(path: Path, actor: Actor) -> None:
    """Fill the actor's tensors on this rank, in place."""
    with unreadable_named(path), torch.no_grad():
        reader = DistributedReader(path / MEGATRON)
        # in the order of the stored tensors: the reader keeps the chunk that it read last
        for block in sorted(checkpoint_blocks(actor), key=lambda block: (block.key, block.offsets)):
            _read_block(reader, block)


def _read_block(reader: DistributedReader, block: CheckpointBlock) -> None:
    key = block.key
    if key not in reader.tensors:  # format 1 with the plain optimizer
        key = key.replace("optimizer.state.param.", "optimizer.state.fp32_param.")
    if key not in reader.tensors:
        raise DamagedCheckpoint(f"{reader.folder / '.metadata'} has no tensor {block.key}")
    size = reader.size(key)
    if size != tuple(block.size) and not (block.is_padded and size[1:] == tuple(block.size[1:])):
        raise DamagedCheckpoint(f"{reader.folder}: {key} is {list(size)} and not {list(block.size)}")
    rows = max(0, min(block.data.shape[0], size[0] - block.offsets[0]))
    block.data[rows:] = 0
    if rows:
        block.data[:rows] = reader.read(key, block.offsets, (rows, *block.data.shape[1:]))


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


@contextmanager
def _disk_errors_named(folder: Path) -> Iterator[None]:
    """Turn the system's refusal to write into one line that says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space on its disk" if full else "make it writable"
        before = latest_checkpoint(folder.parents[1], before=step_of(folder))
        goes_on = f"it goes on from {before}" if before else "there is no checkpoint before it to go on from"
        raise CheckpointError(
            f"the checkpoint {folder} cannot be written: {error.strerror or error}; {remedy} and start again: {goes_on}"
        ) from error
