"""Causal attention with GQA, packed sequences and context parallelism, for runs without Transformer Engine.

Change here: how attention is computed without Transformer Engine. Shapes are Megatron's: [s, b, n, d], or packed [t, n, d]
with `cu_seqlens`. Context parallelism splits every sequence into 2·CP chunks, and rank r holds chunks r and 2·CP-1-r
(zigzag), which balances the causal work. Keys and values are all-gathered; their gradients are reduce-scattered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from dapo_mcore.batch.context import zigzag_positions


@dataclass
class SequenceParams(PackedSeqParams):
    """Megatron's packed-sequence parameters, plus the attention plan that all layers share for one micro-batch."""

    plan: AttentionPlan | None = None


@dataclass(frozen=True)
class AttentionPlan:
    """Indices between flat tokens and a padded [n, length] rectangle of sequences.

    query_slots  int64 [n, Lq]  local token of each query slot (slots past a sequence's end repeat token 0)
    key_slots    int64 [n, Lk]  gathered token of each key slot, in the order of the sequence
    output_slots int64 [t]      slot of each local token in the flattened [n · Lq] rectangle
    mask         bool [n, 1, Lq, Lk] or None: the keys that a query sees; None means plain causal attention (CP = 1)
    """

    query_slots: torch.Tensor
    key_slots: torch.Tensor
    output_slots: torch.Tensor
    mask: torch.Tensor | None


def plan_attention(lengths: np.ndarray, context_parallel: int, rank: int, device: torch.device) -> AttentionPlan:
    """Return the plan for sequences with these padded lengths, int64 [n], packed one after the other."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    held = zigzag_positions(lengths, context_parallel, rank)
    sequence = np.searchsorted(starts, held, side="right") - 1
    local_starts = starts // context_parallel
    slot = np.arange(len(held)) - local_starts[sequence]
    query_slots = np.zeros((len(lengths), int(lengths.max()) // context_parallel), dtype=np.int64)
    query_slots[sequence, slot] = np.arange(len(held))
    output_slots = sequence * query_slots.shape[1] + slot
    key_slots = _key_slots(lengths, starts, context_parallel)
    mask = None
    if context_parallel > 1:
        positions = np.zeros_like(query_slots)
        positions[sequence, slot] = held - starts[sequence]
        # keys past a sequence's end come after all its queries, so the causal mask hides them too
        mask = torch.from_numpy(positions[:, None, :, None] >= np.arange(key_slots.shape[1])).to(device)
    tensors = (torch.from_numpy(a).to(device) for a in (query_slots, key_slots, output_slots))
    return AttentionPlan(*tensors, mask=mask)


def _key_slots(lengths: np.ndarray, starts: np.ndarray, context_parallel: int) -> np.ndarray:
    """Return the index of each position of each sequence after the all-gather in rank order, int64 [n, Lk]."""
    gathered = np.concatenate([zigzag_positions(lengths, context_parallel, r) for r in range(context_parallel)])
    index = np.empty_like(gathered)
    index[gathered] = np.arange(len(gathered))
    position = np.arange(int(lengths.max()))
    inside = position < lengths[:, None]
    return np.where(inside, index[np.where(inside, starts[:-1, None] + position, 0)], 0)


def plan_rectangle(length: int, batch: int, context_parallel: int, rank: int, device: torch.device) -> AttentionPlan:
    """Return the plan for `batch` sequences of the same local `length`, with tokens in [s, b] order (unpacked micro-batches)."""
    lengths = np.full(batch, length * context_parallel, dtype=np.int64)
    plan = plan_attention(lengths, context_parallel, rank, device)

    def to_sequence_first(slots: torch.Tensor, local: int) -> torch.Tensor:
        rank, rest = slots // (local * batch), slots % (local * batch)
        return rank * local * batch + rest % local * batch + rest // local

    order = torch.arange(length * batch, device=device).view(length, batch)
    return AttentionPlan(
        query_slots=to_sequence_first(plan.query_slots, length),
        key_slots=to_sequence_first(plan.key_slots, length),
        output_slots=(order % batch * length + order // batch).flatten(),
        mask=plan.mask,
    )


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
        attended = functional.scaled_dot_product_attention(
            query[plan.query_slots].transpose(1, 2),
            key[plan.key_slots].transpose(1, 2),
            value[plan.key_slots].transpose(1, 2),
            attn_mask=plan.mask,
            is_causal=plan.mask is None,
            scale=self.scale,
            enable_gqa=query.size(1) != key.size(1),
        )
        return attended.transpose(1, 2).flatten(0, 1)[plan.output_slots].reshape(*leading, -1)

    def _plan(self, query: torch.Tensor, packed: PackedSeqParams | None) -> AttentionPlan:
        parallel, rank = self.context_group.size(), self.context_group.rank()
        if packed is None:
            return plan_rectangle(query.size(0), query.size(1), parallel, rank, query.device)
        if isinstance(packed, SequenceParams) and packed.plan is not None:
            return packed.plan
        lengths = torch.diff(packed.cu_seqlens_q).cpu().numpy().astype(np.int64)
        return plan_attention(lengths, parallel, rank, query.device)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Return nothing to store: core attention has no weights."""
        return {}
