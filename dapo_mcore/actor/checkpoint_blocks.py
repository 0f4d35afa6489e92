"""This rank's part of a checkpoint: blocks of the actor's whole tensors, as views of live memory.

Change here: the names of stored tensors, and which rank writes a block. Blocks are rectangles of tensors in the model's own
shape, so a run can resume with any other parallel layout. A distributed optimizer holds a flat slice of each parameter; this
module divides the slice into rectangles. (Megatron-core 0.16.1 to 0.19.2, with `fully_reshardable`, store such state by its
position in padded buckets, and mix positions up if a bucket before the last one is padded.)
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from torch import Tensor

from dapo_mcore.actor.actor import Actor
from dapo_mcore.actor.model.policy import Policy
from dapo_mcore.actor.optimizer import OptimizerShard


class CheckpointBlock(NamedTuple):
    """A rectangle of a stored tensor. Saving reads its elements, loading overwrites them.

    key, size   name and shape of the whole tensor
    offsets     start of the rectangle along each dim of the whole tensor
    data        its elements, in its shape: a view of live memory
    is_written  True on the one rank that writes it
    is_padded   True if the number of rows depends on the parallel layout (padded vocabulary); rows that are not stored are 0

    Rows 2 and 3 of the second layer's [4, 8] matrix, in a model with 6 layers:
    CheckpointBlock("decoder.layers.w", (6, 4, 8), (1, 2, 0), tensor of shape (1, 2, 8), …)
    """

    key: str
    size: tuple[int, ...]
    offsets: tuple[int, ...]
    data: Tensor
    is_written: bool
    is_padded: bool


def checkpoint_blocks(actor: Actor) -> list[CheckpointBlock]:
    """Return this rank's blocks of policy, optimizer and reference policy. No communication."""
    weights = list(_sharded_tensors(actor.policy))
    blocks = [_weight_block(sharded, "") for _, sharded in weights]
    sharded_of = defaultdict(list)
    for parameter, sharded in weights:
        sharded_of[parameter].append(sharded)
    for shard in actor.optimizer.shards():
        for sharded in sharded_of[shard.parameter]:
            blocks += _optimizer_blocks(sharded, shard)
    if actor.reference is not None:
        blocks += [_weight_block(sharded, "reference.") for _, sharded in _sharded_tensors(actor.reference)]
    return blocks


def _sharded_tensors(policy: Policy) -> Iterator[tuple[Tensor, ShardedTensor]]:
    """Yield (weight, the rectangle of a stored tensor that it holds). A weight that stacks gate and up holds two.

    Leaves out Transformer Engine's objects: they describe FP8 scaling, and are empty without FP8.
    """
    for chunk in policy:
        for entry in nested_values(chunk.sharded_state_dict(metadata={"singleton_local_shards": False})):
            if isinstance(entry, ShardedTensorFactory):
                yield from ((entry.data, sharded) for sharded in nested_values(entry.build()))
            elif isinstance(entry, ShardedTensor):
                yield entry.data, entry


def _weight_block(sharded: ShardedTensor, prefix: str) -> CheckpointBlock:
    sizes = (1,) * sharded.prepend_axis_num + sharded.local_shape
    key, data = prefix + sharded.key, sharded.data.detach().view(sizes)
    is_written = is_main_replica(sharded.replica_id)
    return CheckpointBlock(
        key, sharded.global_shape, sharded.global_offset, data, is_written, sharded.allow_shape_mismatch
    )


def _optimizer_blocks(sharded: ShardedTensor, shard: OptimizerShard) -> Iterator[CheckpointBlock]:
    """Yield the blocks of an optimizer shard's state that lie in `sharded`, a contiguous part of the shard's parameter."""
    assert sharded.data.is_contiguous(), f"{sharded.key}: a checkpoint needs contiguous weights"
    first = sharded.data.storage_offset() - shard.parameter.storage_offset()
    pipeline, tensor, data = sharded.replica_id
    is_written = is_main_replica((pipeline, tensor, 0 if shard.is_divided else data))
    leading, base = (1,) * sharded.prepend_axis_num, sharded.global_offset
    for name, values in shard.state.items():
        position = max(shard.start, first)
        stop = min(shard.start + values.numel(), first + sharded.data.numel())
        for offsets, sizes in rectangles(sharded.local_shape, position - first, stop - first):
            whole_offsets = tuple(a + b for a, b in zip(base, (*(0 for _ in leading), *offsets), strict=True))
            view = values.narrow(0, position - shard.start, math.prod(sizes)).view((*leading, *sizes))
            key = f"optimizer.state.{name}.{sharded.key}"
            yield CheckpointBlock(
                key, sharded.global_shape, whole_offsets, view, is_written, sharded.allow_shape_mismatch
            )
            position += math.prod(sizes)


def rectangles(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield (offsets, sizes) of the rectangles that elements [start, stop) of a row-major tensor fill, in order.

    Elements 3 to 9 of a [4, 4] tensor: the end of row 0, all of row 1, the beginning of row 2.
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # complete rows
    if first > last:
        yield from _in_row(shape, last, start, stop)
        return
    yield from _in_row(shape, first - 1, start, first * row)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _in_row(shape, last, last * row, stop)


def _in_row(
    shape: Sequence[int], number: int, start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield the rectangles that elements [start, stop), all in row `number`, fill."""
    row = math.prod(shape[1:])
    for offsets, sizes in rectangles(shape[1:], start - number * row, stop - number * row):
        yield (number, *offsets), (1, *sizes)
