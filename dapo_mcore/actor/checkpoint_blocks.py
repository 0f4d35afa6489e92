"""This rank's part of a checkpoint: blocks of the actor's whole tensors, as views of live memory.

Change here: the names of stored tensors, and which rank writes a block. Blocks are rectangles of tensors in the model's own
shape, so a run can resume with any other parallel layout. A distributed optimizer holds a flat slice of each parameter; this
module divides the slice into rectangles. (Megatron-core 0.16.1 to 0.19.2, with `fully_reshardable`, store such state by its
position in padded buckets, and mix positions up if a bucket before the last one is padded.)
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from dapo_mcore.actor.actor import Actor
from dapo_mcore.actor.model.policy import Policy
from dapo_mcore.actor.optimizer import Optimizer, OptimizerShard
from dapo_mcore.actor.parallel.layout import Layout

CRITIC = "critic."
"""Before the keys of the critic and of its optimizer."""


class CheckpointBlock(NamedTuple):
    """A rectangle of a stored tensor. Saving reads its elements, loading overwrites them.

    key, size   name and shape of the whole tensor
    offsets     start of the rectangle along each dim of the whole tensor
    data        its elements, in its shape: a view of live memory
    is_written  True on the ranks that write it: on one of those that tensor and pipeline parallelism give the same block
    copy, num_copies   this rank's number among the data- and context-parallel ranks that hold the same block; they share the
                writing and reading of it (shares). 0 and 1 for a slice of a distributed optimizer, which no other rank holds
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
    copy: int = 0
    num_copies: int = 1


def checkpoint_blocks(actor: Actor) -> list[CheckpointBlock]:
    """Return this rank's blocks of policy, critic, their optimizers, and reference policy. No communication."""
    layout = actor.layout
    blocks = _trained_blocks(actor.policy, actor.optimizer, layout)
    if actor.critic is not None:
        own = _trained_blocks(actor.critic.model, actor.critic.optimizer, layout)
        blocks += [block._replace(key=CRITIC + block.key) for block in own]
    if actor.reference is not None:
        blocks += [_weight_block(sharded, "reference.", layout) for _, sharded in _sharded_tensors(actor.reference)]
    return blocks


def _trained_blocks(model: Policy, optimizer: Optimizer, layout: Layout) -> list[CheckpointBlock]:
    weights = list(_sharded_tensors(model))
    blocks = [_weight_block(sharded, "", layout) for _, sharded in weights]
    return blocks + list(_shard_blocks(weights, optimizer.shards(), layout))


def gradient_blocks(actor: Actor) -> list[CheckpointBlock]:
    """Return this rank's blocks of the gradients that Optimizer.prepare has left. No communication."""
    return list(_shard_blocks(_sharded_tensors(actor.policy), actor.optimizer.gradients(), actor.layout))


def written_blocks(blocks: Sequence[CheckpointBlock]) -> list[CheckpointBlock]:
    """Return what this rank writes of its blocks: what no other rank holds, and its share of what its copies hold too."""
    return shares([block for block in blocks if block.is_written])


def shares(blocks: Sequence[CheckpointBlock]) -> list[CheckpointBlock]:
    """Return the blocks that this rank alone holds, and its share of those that its copies hold too.

    n copies lay their common blocks end to end and cut the elements into n equal ranges.
    """
    found = [block for block in blocks if block.num_copies == 1]
    for common in _common(blocks):
        for block, ranges in zip(common, _ranges(common), strict=True):
            found += _part(block, *ranges[block.copy])
    return found


@torch.no_grad()
def exchange_shares(blocks: Sequence[CheckpointBlock], layout: Layout) -> None:
    """Fill the blocks that this rank's copies hold too with the shares that each of them has filled.

    Collectives: broadcasts over the groups of copies, as many as there are such blocks and copies.
    """
    for common in _common(blocks):
        group = layout.expert_copies_group if _is_expert(common[0].key) else layout.copies_group
        for block, ranges in zip(common, _ranges(common), strict=True):
            for copy, (start, stop) in enumerate(ranges):
                if start < stop:
                    part = block.data.view(-1)[start:stop].view(torch.uint8)  # gloo does not know all dtypes
                    dist.broadcast(part, dist.get_global_rank(group, copy), group=group)


def _common(blocks: Sequence[CheckpointBlock]) -> Iterator[list[CheckpointBlock]]:
    """Yield the blocks that copies of this rank hold too: those of experts have copies of their own."""
    for is_expert in (False, True):
        if common := [block for block in blocks if block.num_copies > 1 and _is_expert(block.key) == is_expert]:
            yield common


def _ranges(common: Sequence[CheckpointBlock]) -> Iterator[list[tuple[int, int]]]:
    """Yield for each block the elements [start, stop) that each copy has of it."""
    total, position, num_copies = sum(block.data.numel() for block in common), 0, common[0].num_copies
    cuts = [total * copy // num_copies for copy in range(num_copies + 1)]
    for block in common:
        count = block.data.numel()
        within = [min(max(cut - position, 0), count) for cut in cuts]
        yield list(pairwise(within))
        position += count


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


def _weight_block(sharded: ShardedTensor, prefix: str, layout: Layout) -> CheckpointBlock:
    assert sharded.data.is_contiguous(), f"{sharded.key}: a checkpoint needs contiguous weights"
    data = sharded.data.detach().view((1,) * sharded.prepend_axis_num + sharded.local_shape)
    return _block(prefix + sharded.key, sharded, data, _num_copies(sharded, layout))


def _shard_blocks(
    weights: Iterable[tuple[Tensor, ShardedTensor]], shards: Iterable[OptimizerShard], layout: Layout
) -> Iterator[CheckpointBlock]:
    """Yield the blocks of the shards' states."""
    sharded_of = defaultdict(list)
    for parameter, sharded in weights:
        sharded_of[parameter].append(sharded)
    for shard in shards:
        for sharded in sharded_of[shard.parameter]:
            yield from _optimizer_blocks(sharded, shard, layout)


def _optimizer_blocks(sharded: ShardedTensor, shard: OptimizerShard, layout: Layout) -> Iterator[CheckpointBlock]:
    """Yield the blocks of an optimizer shard's state that lie in `sharded`, a contiguous part of the shard's parameter."""
    first = sharded.data.storage_offset() - shard.parameter.storage_offset()
    num_copies = 1 if shard.is_divided else _num_copies(sharded, layout)
    shape = (1,) * sharded.prepend_axis_num + sharded.local_shape
    for name, values in shard.state.items():
        start = max(shard.start, first)
        stop = min(shard.start + values.numel(), first + sharded.data.numel())
        key, position = f"optimizer.state.{name}.{sharded.key}", start - shard.start
        for offsets, sizes in rectangles(shape, start - first, stop - first):
            view = values.narrow(0, position, math.prod(sizes)).view(sizes)
            yield _moved(_block(key, sharded, view, num_copies), offsets)
            position += math.prod(sizes)


def _block(key: str, sharded: ShardedTensor, data: Tensor, num_copies: int) -> CheckpointBlock:
    pipeline, tensor, copy = sharded.replica_id
    assert num_copies == 1 or copy < num_copies, (key, sharded.replica_id, num_copies)
    return CheckpointBlock(
        key,
        sharded.global_shape,
        sharded.global_offset,
        data,
        is_written=pipeline == 0 and tensor == 0,
        is_padded=sharded.allow_shape_mismatch,
        copy=copy if num_copies > 1 else 0,
        num_copies=num_copies,
    )


def _num_copies(sharded: ShardedTensor, layout: Layout) -> int:
    return layout.expert_data if _is_expert(sharded.key) else layout.data * layout.context


def _is_expert(key: str) -> bool:
    return ".experts." in key


def _part(block: CheckpointBlock, start: int, stop: int) -> Iterator[CheckpointBlock]:
    """Yield elements [start, stop) of a block as blocks."""
    flat, position = block.data.view(-1), start
    for offsets, sizes in rectangles(block.data.shape, start, stop):
        view = flat.narrow(0, position, math.prod(sizes)).view(sizes)
        yield _moved(block._replace(data=view), offsets)
        position += math.prod(sizes)


def _moved(block: CheckpointBlock, by: Sequence[int]) -> CheckpointBlock:
    return block._replace(offsets=tuple(a + b for a, b in zip(block.offsets, by, strict=True)))


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
