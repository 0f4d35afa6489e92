"""Attention without Transformer Engine: its indices by hand, and its output against the plain formula in fp64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dapo_mcore.actor.model import attention
from dapo_mcore.actor.model.attention import CoreAttention, SequenceParams, plan_attention, plan_rectangle
from dapo_mcore.batch.context import zigzag_positions

CPU = torch.device("cpu")
HEADS, GROUPS, WIDTH = 4, 2, 8


def core(size: int = 1, rank: int = 0, dropout: float = 0.0) -> CoreAttention:
    config = SimpleNamespace(kv_channels=WIDTH, attention_dropout=dropout)
    groups = SimpleNamespace(cp=SimpleNamespace(size=lambda: size, rank=lambda: rank))
    return CoreAttention(config, layer_number=1, attn_mask_type=None, attention_type="self", pg_collection=groups)


def random_qkv(*leading: int) -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(0)
    return [torch.randn(*leading, n, WIDTH, generator=noise, dtype=torch.float64) for n in (HEADS, GROUPS, GROUPS)]


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return the causal attention of one sequence, [t, n·d], one head after the other."""
    after = torch.ones(len(query), len(query), dtype=torch.bool).triu(1)
    heads = []
    for head in range(HEADS):
        group = head * GROUPS // HEADS
        scores = query[:, head] @ key[:, group].T / math.sqrt(WIDTH)
        heads.append(scores.masked_fill(after, -math.inf).softmax(-1) @ value[:, group])
    return torch.cat(heads, -1)


def packed(lengths: list[int]) -> SequenceParams:
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return SequenceParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens)


def test_the_plan_of_a_rank_by_hand():
    """Sequences of 4 and 8 over two ranks. Rank 0 holds positions 0, 3 and 0, 1, 6, 7; after the all-gather its tokens come
    first: 0, 3 | 4, 5, 10, 11, then rank 1's 1, 2 | 6, 7, 8, 9 in positions of the pack."""
    plan = plan_attention(np.array([4, 8]), 2, 0, CPU)
    assert plan.query_slots.tolist() == [[0, 1, 0, 0], [2, 3, 4, 5]]
    assert plan.output_slots.tolist() == [0, 1, 4, 5, 6, 7]
    assert plan.key_slots.tolist() == [[0, 6, 7, 1, 0, 0, 0, 0], [2, 3, 8, 9, 10, 11, 4, 5]]
    seen = plan.mask.sum(-1)[:, 0].tolist()
    assert seen[0][:2] == [1, 4] and seen[1] == [1, 2, 7, 8]


def test_the_plan_of_a_rectangle_by_hand():
    """Two sequences of two tokens in [s, b] order: tokens 0 and 2 are the first sequence."""
    plan = plan_rectangle(length=2, batch=2, context_parallel=1, rank=0, device=CPU)
    assert plan.query_slots.tolist() == plan.key_slots.tolist() == [[0, 2], [1, 3]]
    assert plan.output_slots.tolist() == [0, 2, 1, 3]
    assert plan.mask is None, "plain causal attention"


def test_packed_sequences_do_not_see_each_other():
    qkv = random_qkv(9)
    out = core()(*qkv, packed_seq_params=packed([3, 1, 5]))
    expected = torch.cat([plain(*part) for part in zip(*(x.split([3, 1, 5]) for x in qkv), strict=True)])
    torch.testing.assert_close(out, expected)


def test_a_rectangle_of_sequences_is_attended_column_by_column():
    qkv = random_qkv(6, 3)
    expected = torch.stack([plain(*(x[:, column] for x in qkv)) for column in range(3)], 1)
    torch.testing.assert_close(core()(*qkv), expected)


@pytest.mark.parametrize("size", [2, 3])
def test_context_parallel_ranks_compute_the_rows_of_one_rank(size, monkeypatch):
    """The ranks run one after the other; the all-gather returns what all of them hold."""
    lengths = np.array([2, 4, 1]) * 2 * size
    qkv = random_qkv(int(lengths.sum()))
    held = [torch.from_numpy(zigzag_positions(lengths, size, rank)) for rank in range(size)]
    gathered = torch.cat([torch.cat([x[rows] for x in qkv[1:]], -1) for rows in held])
    whole = core()(*qkv, packed_seq_params=packed(lengths.tolist()))
    for rank, rows in enumerate(held):

        def gather(own: torch.Tensor, rows: torch.Tensor = rows, **_: object) -> torch.Tensor:
            assert torch.equal(own, torch.cat([qkv[1][rows], qkv[2][rows]], -1))
            return gathered

        monkeypatch.setattr(attention, "gather_from_sequence_parallel_region", gather)
        part = core(size, rank)(*(x[rows] for x in qkv), packed_seq_params=packed(lengths.tolist()))
        torch.testing.assert_close(part, whole[rows])


def test_a_plan_made_for_the_micro_batch_is_used_by_every_layer():
    qkv, params = random_qkv(9), packed([9])
    params.plan = plan_attention(np.array([3, 1, 5]), 1, 0, CPU)
    torch.testing.assert_close(
        core()(*qkv, packed_seq_params=params), core()(*qkv, packed_seq_params=packed([3, 1, 5]))
    )


def test_dropout_is_refused_and_there_is_nothing_to_store():
    with pytest.raises(AssertionError):
        core(dropout=0.1)
    assert core().sharded_state_dict() == {}
