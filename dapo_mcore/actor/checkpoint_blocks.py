"""What a checkpoint holds of the actor, as this rank sees it: blocks of whole tensors, as views of the live memory.

Change here: the names of stored tensors, and which rank writes a block. Blocks are rectangles of tensors in the model's own
shape, so a run may be resumed on any other mesh. A distributed optimizer holds a flat slice of a parameter; it is cut into
rectangles here, parameter by parameter. (Megatron-core 0.16.1 to 0.19.2 store such state by places in padded buckets,
`fully_reshardable`, and confuse them where a bucket that is not the last one is padded.)
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
from dapo_mcore.actor.model.policy import PolicyModel
from dapo_mcore.actor.optimizer import OptimizerShard


class CheckpointBlock(NamedTuple):
    """A rectangle of a stored tensor. Saving copies its elements out, loading copies into them.

    key, size   name and shape of the whole tensor
    offsets     where the rectangle begins along each dim of the whole tensor
    data        its elements, in its shape: a view of live memory
    is_written  True on the one rank that writes it
    is_padded   True if the whole tensor has more rows on some meshes (the padded vocabulary); rows that are not stored are 0

    Rows 2 and 3 of the second layer's [4, 8] matrix: CheckpointBlock("decoder.layers.w", (6, 4, 8), (1, 2, 0), tensor of (1, 2, 8), …)
    """

    key: str
    size: tuple[int, ...]
    offsets: tuple[int, ...]
    data: Tensor
    is_written: bool
    is_padded: bool


def checkpoint_blocks(actor: Actor) -> list[CheckpointBlock]:
    """Return this rank's blocks of policy, optimizer and reference policy. No communication."""
    policy = list(_pieces(actor.policy))
    blocks = [_whole(piece, "") for _, piece in policy]
    pieces_of = defaultdict(list)
    for parameter, piece in policy:
        pieces_of[parameter].append(piece)
    for shard in actor.optimizer.shards():
        for piece in pieces_of[shard.parameter]:
            blocks += _cut(piece, shard)
    if actor.reference is not None:
        blocks += [_whole(piece, "reference.") for _, piece in _pieces(actor.reference)]
    return blocks


def _pieces(model: PolicyModel) -> Iterator[tuple[Tensor, ShardedTensor]]:
    """(weight, a rectangle of a stored tensor that it holds). Of MLPs with gate and up, one weight holds two.

    Objects are left out: those of Transformer Engine describe FP8 scaling, and are empty without it.
    """
    for entry in nested_values(model.sharded_state_dict(metadata={"singleton_local_shards": False})):
        if isinstance(entry, ShardedTensorFactory):
            yield from ((entry.data, piece) for piece in nested_values(entry.build()))
        elif isinstance(entry, ShardedTensor):
            yield entry.data, entry


def _whole(piece: ShardedTensor, prefix: str) -> CheckpointBlock:
    sizes = (1,) * piece.prepend_axis_num + piece.local_shape
    key, data = prefix + piece.key, piece.data.detach().view(sizes)
    written = is_main_replica(piece.replica_id)
    return CheckpointBlock(key, piece.global_shape, piece.global_offset, data, written, piece.allow_shape_mismatch)


def _cut(piece: ShardedTensor, shard: OptimizerShard) -> Iterator[CheckpointBlock]:
    """Yield the blocks of a shard's state that lie in `piece`, a contiguous part of the shard's parameter."""
    assert piece.data.is_contiguous(), f"{piece.key}: a checkpoint needs contiguous weights"
    begin = piece.data.storage_offset() - shard.parameter.storage_offset()
    pipeline, tensor, data = piece.replica_id
    is_written = is_main_replica((pipeline, tensor, 0 if shard.is_divided else data))
    leading, offset = (1,) * piece.prepend_axis_num, piece.global_offset
    for name, values in shard.state.items():
        at = max(shard.start, begin)
        stop = min(shard.start + values.numel(), begin + piece.data.numel())
        for offsets, sizes in rectangles(piece.local_shape, at - begin, stop - begin):
            place = tuple(a + b for a, b in zip(offset, (*(0 for _ in leading), *offsets), strict=True))
            view = values.narrow(0, at - shard.start, math.prod(sizes)).view((*leading, *sizes))
            key = f"optimizer.state.{name}.{piece.key}"
            yield CheckpointBlock(key, piece.global_shape, place, view, is_written, piece.allow_shape_mismatch)
            at += math.prod(sizes)


def rectangles(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield (offsets, sizes) of the rectangles that elements [start, stop) of a row-major tensor fill, in their order.

    Elements 3 to 9 of a [4, 4] tensor: the end of row 0, all of row 1, the begin of row 2.
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows
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
    """Yield the rectangles of elements [start, stop), which all lie in row `number`."""
    row = math.prod(shape[1:])
    for offsets, sizes in rectangles(shape[1:], start - number * row, stop - number * row):
        yield (number, *offsets), (1, *sizes)
