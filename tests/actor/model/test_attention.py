"""Attention without Transformer Engine: its indices by hand, and its output against the plain formula in fp64."""

from __future__ import annotations

import math
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


def packed(lengths: list[int], size: int = 1, rank: int = 0) -> SequenceParams:
    return SequenceParams(qkv_format="thd", plan=plan_attention(np.array(lengths), size, rank, CPU))


def attend_as_ranks(lengths: list[int], size: int, qkv: list[torch.Tensor], patch: pytest.MonkeyPatch) -> torch.Tensor:
    """Return the output of all ranks, computed one after the other, in the order of the pack."""
    held = [torch.from_numpy(zigzag_positions(np.array(lengths), size, rank)) for rank in range(size)]
    gathered = torch.cat([torch.cat([x[rows] for x in qkv[1:]], -1) for rows in held])
    out = torch.empty(len(qkv[0]), HEADS * WIDTH, dtype=qkv[0].dtype)
    for rank, rows in enumerate(held):

        def gather(own: torch.Tensor, rows: torch.Tensor = rows, **_: object) -> torch.Tensor:
            assert torch.equal(own, torch.cat([qkv[1][rows], qkv[2][rows]], -1))
            return gathered

        patch.setattr(attention, "gather_from_sequence_parallel_region", gather)
        out[rows] = core(size, rank)(*(x[rows] for x in qkv), packed_seq_params=packed(lengths, size, rank))
    return out


def test_the_plan_of_a_rank_by_hand():
    """Sequences of 4 and 8 over two ranks. Rank 0 holds positions 0, 3 and 0, 1, 6, 7; after the all-gather its tokens come
    first: 0, 3 | 4, 5, 10, 11, then rank 1's 1, 2 | 6, 7, 8, 9 in positions of the pack."""
    plan = plan_attention(np.array([4, 8]), 2, 0, CPU)
    assert plan.output_slots.tolist() == [0, 1, 4, 5, 6, 7]
    (whole,) = plan.rectangles
    assert whole.query_slots.tolist() == [[0, 1, 0, 0], [2, 3, 4, 5]]
    assert whole.key_slots.tolist() == [[0, 6, 7, 1, 0, 0, 0, 0], [2, 3, 8, 9, 10, 11, 4, 5]]
    assert whole.positions.tolist() == [[0, 3, 0, 0], [0, 1, 6, 7]]
    assert whole.blocks == ((0, 4, 8),)


def test_a_rectangle_is_at_least_two_thirds_full():
    """9, 5 and 4 fill 18 of 27 slots; with a 1 they would fill 19 of 36."""
    plan = plan_attention(np.array([1, 9, 5, 1, 4]), 1, 0, CPU)
    assert [rectangle.query_slots.tolist() for rectangle in plan.rectangles] == [
        [[1, 2, 3, 4, 5, 6, 7, 8, 9], [10, 11, 12, 13, 14, 0, 0, 0, 0], [16, 17, 18, 19, 0, 0, 0, 0, 0]],
        [[0], [15]],
    ]
    assert plan.output_slots.tolist() == [27, *range(9), *range(9, 14), 28, *range(18, 22)]
    assert all(rectangle.blocks == () for rectangle in plan.rectangles), "plain causal attention"


def test_a_long_sequence_beside_many_short_ones_needs_memory_for_its_tokens_only():
    """One rectangle would have 64 times 20,480 slots; a mask for all queries of a rank would have 210 million elements."""
    lengths = np.array([20_480] + [32] * 63)
    for size in (1, 2, 4):
        plan = plan_attention(lengths, size, 0, CPU)
        assert sum(rectangle.key_slots.numel() for rectangle in plan.rectangles) <= 1.5 * lengths.sum()
        for rectangle in plan.rectangles if size > 1 else ():
            assert [begin for begin, _, _ in rectangle.blocks[1:]] == [end for _, end, _ in rectangle.blocks[:-1]]
            sizes = [(end - begin) * keys * len(rectangle.key_slots) for begin, end, keys in rectangle.blocks]
            assert max(sizes) <= attention.MASK_ELEMENTS
        assert len(plan.rectangles[0].blocks) == {1: 0, 2: 13, 4: 7}[size]


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_attention_of_a_long_sequence_has_one_block_s_mask_at_a_time(size, monkeypatch):
    """Forward and backward pass of the first of `size` ranks over 20,480 + 63 · 32 tokens. Most is a block's mask, one byte per
    pair, and the fp32 bias that PyTorch makes of it; the mask of all queries would have 0.2 or 0.1 GB, its bias four times that.
    """
    lengths = np.array([20_480] + [32] * 63)
    local, whole = int(lengths.sum()) // size, int(lengths.sum())
    monkeypatch.setattr(attention, "gather_from_sequence_parallel_region", lambda own, **_: own.repeat(size, 1, 1))
    query, key, value = (torch.randn(local, n, WIDTH).requires_grad_() for n in (2, 1, 1))
    with PeakBytes() as peak:
        out = core(size)(query, key, value, packed_seq_params=packed(lengths.tolist(), size))
        out.sum().backward()
    masks, token = (
        5 * attention.MASK_ELEMENTS,
        4 * WIDTH * 2,
    )  # bytes per token of queries, or of keys and values of a head
    assert masks < peak.bytes < 1.25 * masks + 16 * (local + whole) * token < 0.2e9


class PeakBytes(TorchDispatchMode):
    """The largest number of bytes that the results of operations had together, while entered."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.now = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.alive:
                storage = tensor.untyped_storage()
                self._add(storage._cdata, storage.nbytes())
                weakref.finalize(storage, self._add, storage._cdata, -storage.nbytes())
        return result

    def _add(self, address: int, nbytes: int) -> None:
        self.alive ^= {address}
        self.now += nbytes
        self.bytes = max(self.bytes, self.now)


def test_the_plan_of_a_rectangle_by_hand():
    """Two sequences of two tokens in [s, b] order: tokens 0 and 2 are the first sequence."""
    plan = plan_rectangle(length=2, batch=2, context_parallel=1, rank=0, device=CPU)
    (whole,) = plan.rectangles
    assert whole.query_slots.tolist() == whole.key_slots.tolist() == [[0, 2], [1, 3]]
    assert plan.output_slots.tolist() == [0, 2, 1, 3]
    assert whole.blocks == (), "plain causal attention"


def test_packed_sequences_do_not_see_each_other():
    qkv = random_qkv(9)
    out = core()(*qkv, packed_seq_params=packed([3, 1, 5]))
    expected = torch.cat([plain(*part) for part in zip(*(x.split([3, 1, 5]) for x in qkv), strict=True)])
    torch.testing.assert_close(out, expected)


def test_a_rectangle_of_sequences_is_attended_column_by_column():
    qkv = random_qkv(6, 3)
    expected = torch.stack([plain(*(x[:, column] for x in qkv)) for column in range(3)], 1)
    torch.testing.assert_close(core()(*qkv), expected)


@pytest.mark.parametrize("mask_elements", [attention.MASK_ELEMENTS, 100, 1], ids="{} pairs".format)
@pytest.mark.parametrize("size", [2, 3])
def test_context_parallel_ranks_compute_the_rows_and_gradients_of_one_rank(size, mask_elements, monkeypatch):
    """Also where a mask of the whole rectangle, or even of one row of it, would be too large."""
    monkeypatch.setattr(attention, "MASK_ELEMENTS", mask_elements)
    lengths = [2 * size * n for n in (2, 4, 1, 1, 1, 1)]
    alone, spread = ([x.requires_grad_() for x in random_qkv(sum(lengths))] for _ in range(2))
    whole = core()(*alone, packed_seq_params=packed(lengths))
    parts = attend_as_ranks(lengths, size, spread, monkeypatch)
    torch.testing.assert_close(parts, whole)
    for out in (whole, parts):
        (out * torch.arange(out.numel()).view_as(out).sin()).sum().backward()
    for found, expected in zip(spread, alone, strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


def test_no_mask_is_kept_for_the_backward_pass(monkeypatch):
    """The largest tensor that autograd saves is that of the keys, not a mask."""
    lengths, saved = [256], []
    qkv = [x.requires_grad_() for x in random_qkv(256)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        attend_as_ranks(lengths, 2, qkv, monkeypatch)
    assert 0 < max(saved) <= 2 * qkv[1].numel() < 128 * 256


def test_dropout_is_refused_and_there_is_nothing_to_store():
    with pytest.raises(AssertionError):
        core(dropout=0.1)
    assert core().sharded_state_dict() == {}
