"""Causal attention with GQA, packed sequences and context parallelism, for runs without Transformer Engine.

Change here: how attention is computed without Transformer Engine. Shapes are Megatron's: [s, b, n, d], or packed [t, n, d]
with `cu_seqlens`. Sequences of similar length are attended together, padded to a rectangle. Context parallelism splits every
sequence into 2·CP chunks, and rank r holds chunks r and 2·CP-1-r (zigzag), which balances the causal work. Keys and values
are all-gathered; their gradients are reduce-scattered. The queries of a rank then start in the middle of a sequence, which
PyTorch's causal attention cannot express without a mask. The mask exists for one block of queries at a time, so memory grows
with the number of tokens, not with its square.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dapo_mcore.batch.context import zigzag_positions
from dapo_mcore.batch.ragged import ragged_ranges

MASK_ELEMENTS = 2**24
"""Largest number of (query, key) pairs in a mask: 16 MiB, and 64 MiB as the fp32 bias that PyTorch makes of it."""


@dataclass
class SequenceParams(PackedSeqParams):
    """Megatron's packed-sequence parameters, plus the attention plan that all layers share for one micro-batch."""

    plan: AttentionPlan | None = None


@dataclass(frozen=True)
class Rectangle:
    """Indices of the tokens of n sequences, padded to the longest of them.

    query_slots  int64 [n, Lq]  local token of each query slot (slots past a sequence's end repeat token 0)
    key_slots    int64 [n, Lk]  gathered token of each key slot, in the order of the sequence
    positions    int64 [n, Lq]  position of each query in its sequence; it sees the keys up to there
    blocks       (begin, end, number of keys that they see) of the query slots that are attended together; empty means plain
                 causal attention over whole sequences (CP = 1)
    """

    query_slots: torch.Tensor
    key_slots: torch.Tensor
    positions: torch.Tensor
    blocks: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class AttentionPlan:
    """The rectangles of a micro-batch.

    output_slots  int64 [t], slot of each local token among the slots of all rectangles, flattened and concatenated
    """

    rectangles: tuple[Rectangle, ...]
    output_slots: torch.Tensor


def plan_attention(lengths: np.ndarray, context_parallel: int, rank: int, device: torch.device) -> AttentionPlan:
    """Return the plan for sequences with these padded lengths, int64 [n], packed one after the other."""
    starts = np.cumsum(lengths) - lengths
    held = zigzag_positions(lengths, context_parallel, rank)
    gathered = _gathered_tokens(lengths, context_parallel) if context_parallel > 1 else None
    rectangles, output_slots, num_slots = [], np.empty_like(held), 0
    for members in _similar_lengths(lengths):
        local, begin = lengths[members] // context_parallel, starts[members]
        tokens = ragged_ranges(begin // context_parallel, local)
        row, column = np.repeat(np.arange(len(members)), local), ragged_ranges(np.zeros_like(local), local)
        query_slots, positions = np.zeros((2, len(members), int(local.max())), dtype=np.int64)
        query_slots[row, column], positions[row, column] = tokens, held[tokens] - begin[row]
        key_slots = query_slots if gathered is None else _key_slots(lengths[members], begin, gathered)
        output_slots[tokens] = num_slots + row * query_slots.shape[1] + column
        num_slots += query_slots.size
        blocks = _blocks(positions, key_slots.shape[1]) if context_parallel > 1 else ()
        rectangles.append(Rectangle(*(_moved(x, device) for x in (query_slots, key_slots, positions)), blocks))
    return AttentionPlan(tuple(rectangles), _moved(output_slots, device))


def _similar_lengths(lengths: np.ndarray) -> list[np.ndarray]:
    """Return the sequences in groups, each in order, such that every padded rectangle is at least two thirds full."""
    groups, rest = [], np.argsort(-lengths, kind="stable")
    while len(rest):
        slots = lengths[rest[0]] * np.arange(1, len(rest) + 1)
        count = int((2 * slots <= 3 * np.cumsum(lengths[rest])).sum())  # 2 · slots - 3 · tokens falls, then rises
        groups.append(np.sort(rest[:count]))
        rest = rest[count:]
    return groups


def _gathered_tokens(lengths: np.ndarray, context_parallel: int) -> np.ndarray:
    """Return the index of each token of the pack after the all-gather in rank order, int64 [Σ lengths]."""
    order = np.concatenate([zigzag_positions(lengths, context_parallel, r) for r in range(context_parallel)])
    index = np.empty_like(order)
    index[order] = np.arange(len(order))
    return index


def _key_slots(lengths: np.ndarray, starts: np.ndarray, gathered: np.ndarray) -> np.ndarray:
    """Return the gathered token at each position of each sequence, int64 [n, Lk]; token 0 past a sequence's end."""
    position = np.arange(int(lengths.max()))
    inside = position < lengths[:, None]
    return np.where(inside, gathered[np.where(inside, starts[:, None] + position, 0)], 0)


def _blocks(positions: np.ndarray, num_keys: int) -> tuple[tuple[int, int, int], ...]:
    """Return blocks of query slots whose masks have at most MASK_ELEMENTS, if one row of slots has no more."""
    num_sequences, num_queries = positions.shape
    step = max(1, MASK_ELEMENTS // (num_sequences * num_keys))
    spans = [(begin, min(begin + step, num_queries)) for begin in range(0, num_queries, step)]
    return tuple((begin, end, int(positions[:, begin:end].max()) + 1) for begin, end in spans)


def _moved(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)  # a blocking copy would wait for the device's queue


def plan_rectangle(length: int, batch: int, context_parallel: int, rank: int, device: torch.device) -> AttentionPlan:
    """Return the plan for `batch` sequences of the same local `length`, with tokens in [s, b] order (unpacked micro-batches)."""
    lengths = np.full(batch, length * context_parallel, dtype=np.int64)
    (whole,) = plan_attention(lengths, context_parallel, rank, device).rectangles

    def to_sequence_first(slots: torch.Tensor) -> torch.Tensor:
        rank, rest = slots // (length * batch), slots % (length * batch)
        return rank * length * batch + rest % length * batch + rest // length

    slots = dict(query_slots=to_sequence_first(whole.query_slots), key_slots=to_sequence_first(whole.key_slots))
    order = torch.arange(length * batch, device=device)
    return AttentionPlan((replace(whole, **slots),), order % batch * length + order // batch)


class CoreAttention(MegatronModule):
    """softmax(QKᵀ·scale)V for Megatron's SelfAttention, with PyTorch's scaled-dot-product kernel.

    Takes the parameters of upstream's DotProductAttention (megatron-core 0.16.1). Collectives: all-gather of keys and values
    over the context-parallel group in the forward pass, reduce-scatter in the backward pass. Does not support dropout, because
    the log-probs of a rollout must be reproducible.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ):
        super().__init__(config=config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.context_group = groups.cp
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        assert not (config.attention_dropout if attention_dropout is None else attention_dropout)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Return the attention output, [s, b, n·d], or [t, n·d] if packed."""
        leading = query.shape[:-2]
        plan = self._plan(query, packed_seq_params)
        query, key, value = (x.flatten(0, -3) for x in (query, key, value))
        if self.context_group.size() > 1:
            key, value = gather_from_sequence_parallel_region(
                torch.cat([key, value], dim=-1), tensor_parallel_output_grad=True, group=self.context_group
            ).split([key.size(-1), value.size(-1)], dim=-1)
        attended = torch.cat([self._attend(query, key, value, rectangle) for rectangle in plan.rectangles])
        return attended[plan.output_slots].reshape(*leading, -1)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rectangle: Rectangle
    ) -> torch.Tensor:
        """Return the output of all query slots, [n · Lq, heads, d]."""
        query = query[rectangle.query_slots].transpose(1, 2)
        key, value = (x[rectangle.key_slots].transpose(1, 2) for x in (key, value))
        if not rectangle.blocks:
            gqa = query.size(1) != key.size(1)
            attended = functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=self.scale, enable_gqa=gqa
            )
            return attended.transpose(1, 2).flatten(0, 1)
        blocks = [
            checkpoint(  # so that no mask is kept for the backward pass
                self._attend_masked,
                query[:, :, begin:end],
                key[:, :, :num_keys],
                value[:, :, :num_keys],
                rectangle.positions[:, begin:end],
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for begin, end, num_keys in rectangle.blocks
        ]
        return torch.cat(blocks, 2).transpose(1, 2).flatten(0, 1)

    def _attend_masked(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        # keys past a sequence's end come after all its queries, so the causal mask hides them too
        mask = positions[:, None, :, None] >= torch.arange(key.size(2), device=key.device)
        # with enable_gqa and a mask PyTorch would write out the scores of all heads
        key, value = (x.repeat_interleave(query.size(1) // x.size(1), 1) for x in (key, value))
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale)

    def _plan(self, query: torch.Tensor, packed: PackedSeqParams | None) -> AttentionPlan:
        if packed is None:
            parallel, rank = self.context_group.size(), self.context_group.rank()
            return plan_rectangle(query.size(0), query.size(1), parallel, rank, query.device)
        assert isinstance(packed, SequenceParams) and packed.plan is not None
        return packed.plan

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Return nothing to store: core attention has no weights."""
        return {}
