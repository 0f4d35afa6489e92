"""Micro-batches by hand, and rebuilt from all context-parallel ranks."""

import numpy as np
import pytest
import torch

from dapo_mcore.batch.context import undo_zigzag
from dapo_mcore.batch.microbatch import build_micro_batch
from dapo_mcore.types import TrainBatch

PAD = 99


def make_batch(lengths, seed=0):
    """Return random samples whose prompts are a third of the length. Some response tokens carry no loss."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    mask = rng.random(offsets[-1]) > 0.3
    for begin, length in zip(offsets, lengths):
        mask[begin : begin + max(1, length // 3)] = False
    count = len(lengths)
    return TrainBatch(
        tokens=rng.integers(0, 90, offsets[-1]).astype(np.int32),
        loss_mask=mask,
        rollout_logprobs=(rng.normal(size=offsets[-1]) * mask).astype(np.float32),
        offsets=offsets,
        rewards=np.zeros(count),
        group_ids=np.zeros(count, np.int64),
        in_statistics=np.ones(count, bool),
    )


def build(batch, samples, cp=1, rank=0, multiple=1, packing=True, balance=None):
    numbers = np.arange(batch.num_samples, dtype=np.float64)
    return build_micro_batch(
        batch,
        samples,
        advantages=numbers + 0.5,
        weights=1 / (numbers + 1),
        context_parallel=cp,
        context_rank=rank,
        tensor_multiple=multiple,
        packing=packing,
        pad_token=PAD,
        balance_weights=balance,
    )


SMALL = TrainBatch(
    tokens=np.array([5, 6, 7, 8, 9, 10], np.int32),
    loss_mask=np.array([False, False, True, False, True, True]),
    rollout_logprobs=np.array([0, 0, -0.1, 0, -0.2, -0.3], np.float32),
    offsets=np.array([0, 3, 6]),
    rewards=np.zeros(2),
    group_ids=np.zeros(2, np.int64),
    in_statistics=np.ones(2, bool),
)


def test_packed_by_hand():
    micro = build(SMALL, [1, 0], multiple=4)  # 6 tokens, a dummy of 2 fills the pack
    assert micro.tokens.tolist() == [
        [8, 9, 10, 5, 6, 7, 8, 9]
    ]  # the dummy is the beginning of the longest, first of all
    assert micro.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1]]
    assert micro.cu_seqlens.tolist() == [0, 3, 6, 8] and micro.cu_seqlens.dtype == torch.int32
    assert micro.max_seqlen == 3
    assert micro.rows.tolist() == [0, 1, 4]
    assert micro.targets.tolist() == [9, 10, 7]
    assert micro.sample_ids.tolist() == [1, 1, 0]
    assert micro.advantages.tolist() == [1.5, 1.5, 0.5]
    assert micro.token_weights.tolist() == [0.5, 0.5, 1.0]
    torch.testing.assert_close(micro.rollout_logprobs, torch.tensor([-0.2, -0.3, -0.1]))


def test_packed_context_parallel_by_hand():
    # each sequence is padded to 4 and split into chunks of 1: rank 0 holds positions 0 and 3, rank 1 positions 1 and 2
    first, second = build(SMALL, [0, 1], cp=2, rank=0), build(SMALL, [0, 1], cp=2, rank=1)
    assert first.tokens.tolist() == [[5, 5, 8, 5]] and second.tokens.tolist() == [[6, 7, 9, 10]]
    assert first.position_ids.tolist() == [[0, 3, 0, 3]] and second.position_ids.tolist() == [[1, 2, 1, 2]]
    assert first.cu_seqlens.tolist() == second.cu_seqlens.tolist() == [0, 4, 8]
    assert (first.rows.tolist(), first.targets.tolist()) == ([2], [9])
    assert (second.rows.tolist(), second.targets.tolist()) == ([0, 2], [7, 10])


def test_rectangle_by_hand():
    micro = build(SMALL, [0, 1], multiple=4, packing=False)
    assert micro.tokens.tolist() == [[5, 6, 7, 5], [8, 9, 10, 5]]
    assert micro.position_ids.tolist() == [[0, 1, 2, 3]] * 2
    assert (micro.cu_seqlens, micro.max_seqlen) == (None, 4)
    assert micro.rows.tolist() == [1 * 2 + 0, 0 * 2 + 1, 1 * 2 + 1]  # position · b + sample
    assert micro.targets.tolist() == [7, 9, 10]


def test_dtypes():
    micro = build(SMALL, [0, 1], cp=2)
    for name in ("tokens", "position_ids", "rows", "targets", "sample_ids"):
        assert getattr(micro, name).dtype == torch.int64, name
    for name in ("advantages", "token_weights", "rollout_logprobs"):
        assert getattr(micro, name).dtype == torch.float32, name
    assert micro.old_logprobs is None and micro.ref_logprobs is None


def whole_of(parts, segments, cp, packing, name):
    """Return a [b, s] field of all context-parallel ranks in the flat order before the split."""
    return (
        undo_zigzag([getattr(part, name).flatten() for part in parts], segments, cp)
        if packing
        else torch.cat(
            [
                undo_zigzag([getattr(part, name)[i] for part in parts], segments[i : i + 1], cp)
                for i in range(len(segments))
            ]
        )
    )


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("multiple", [1, 3, 4])
@pytest.mark.parametrize("cp", [1, 2, 4])
def test_all_ranks_together_hold_every_token_and_every_row_exactly_once(cp, multiple, packing):
    batch = make_batch([9, 1, 30, 17, 5, 2])
    samples = [3, 0, 5, 2, 1]
    parts = [build(batch, samples, cp, rank, multiple, packing) for rank in range(cp)]

    if packing:
        segments = np.diff(parts[0].cu_seqlens.numpy().astype(np.int64))
        assert all(torch.equal(part.cu_seqlens, parts[0].cu_seqlens) for part in parts)
        assert parts[0].max_seqlen == segments.max()
    else:
        segments = np.full(len(samples), parts[0].max_seqlen)
        assert all(part.tokens.shape[0] == len(samples) for part in parts)
    assert {tuple(part.tokens.shape) for part in parts} == {tuple(parts[0].tokens.shape)}
    assert parts[0].tokens.shape[1] % multiple == 0

    tokens, positions = (whole_of(parts, segments, cp, packing, name) for name in ("tokens", "position_ids"))
    begins = np.cumsum(segments) - segments
    longest = np.resize(batch.tokens[batch.offsets[2] : batch.offsets[3]], segments.max())
    for sample, begin, segment in zip(samples, begins, segments):
        length = batch.lengths[sample]
        expected = batch.tokens[batch.offsets[sample] : batch.offsets[sample + 1]].tolist()
        assert tokens[begin : begin + length].tolist() == expected
        assert tokens[begin + length : begin + segment].tolist() == longest[length:segment].tolist()
        assert positions[begin : begin + segment].tolist() == list(range(segment))
    dummy = tokens[sum(segments[: len(samples)]) :]
    assert dummy.tolist() == longest[: len(dummy)].tolist()

    found = sorted(entry for part in parts for entry in rows_of(part))
    wanted = sorted(
        (sample, t, int(batch.tokens[begin + t + 1]), float(batch.rollout_logprobs[begin + t + 1]), sample + 0.5)
        for sample in samples
        for begin in [int(batch.offsets[sample])]
        for t in range(batch.lengths[sample] - 1)
        if batch.loss_mask[begin + t + 1]
    )
    assert found == wanted and len(wanted) > 10
    for part in parts:
        torch.testing.assert_close(part.token_weights, 1 / (part.sample_ids + 1).float())


def rows_of(micro):
    """Return (sample, position, target, engine log-prob, advantage) of each row, read from flattened [s, b]."""
    position = micro.position_ids.T.flatten()[micro.rows]
    columns = (micro.sample_ids, position, micro.targets, micro.rollout_logprobs, micro.advantages)
    return list(zip(*(column.tolist() for column in columns)))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("cp", [1, 2])
def test_a_row_reads_the_token_before_its_target(cp, packing):
    """Tokens are their own positions, so the token under a row must be its target minus one."""
    batch = make_batch([7, 12, 4])
    batch.tokens[:] = np.concatenate([1000 * i + np.arange(n) for i, n in enumerate(batch.lengths)])
    for rank in range(cp):
        micro = build(batch, [0, 1, 2], cp, rank, 2, packing)
        assert torch.equal(micro.tokens.T.flatten()[micro.rows], micro.targets - 1)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("cp", "multiple", "tokens"), [(1, 1, 1), (1, 4, 4), (2, 1, 2), (2, 3, 6)])
def test_no_samples_give_the_smallest_dummy(cp, multiple, tokens, packing):
    micro = build(SMALL, [], cp, cp - 1, multiple, packing)
    assert micro.tokens.tolist() == [[PAD] * tokens]
    assert micro.max_seqlen == tokens * cp
    assert micro.cu_seqlens is None if not packing else micro.cu_seqlens.tolist() == [0, tokens * cp]
    for name in ("rows", "targets", "advantages", "token_weights", "rollout_logprobs", "sample_ids"):
        assert len(getattr(micro, name)) == 0, name


def test_a_fully_masked_sample_has_no_rows():
    batch = make_batch([6, 6])
    batch.loss_mask[:6] = False
    micro = build(batch, [0, 1])
    assert set(micro.sample_ids.tolist()) == {1}


def test_the_batch_is_not_shared():
    micro = build(SMALL, [0, 1])
    micro.tokens.zero_()
    micro.rollout_logprobs.zero_()
    assert SMALL.tokens.tolist() == [5, 6, 7, 8, 9, 10] and SMALL.rollout_logprobs.any()


def test_tokens_know_their_sample_and_padding_has_none():
    balance = np.array([0.5, 0.25])
    packed = build(SMALL, [1, 0], multiple=4, balance=balance)
    assert packed.sequence_ids.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2]]
    assert packed.balance_weights.tolist() == [0.25, 0.5]
    # over two context-parallel ranks each sequence has four tokens, and rank 1 has the middle two
    assert build(SMALL, [1, 0], cp=2, rank=1, balance=balance).sequence_ids.tolist() == [[0, 0, 1, 1]]
    assert build(SMALL, [1, 0], cp=2, rank=0, balance=balance).sequence_ids.tolist() == [[0, 2, 1, 2]]
    assert build(SMALL, [1], multiple=4, packing=False, balance=balance).sequence_ids.tolist() == [[0, 0, 0, 1]]
    empty = build(SMALL, [], balance=balance)
    assert empty.sequence_ids.tolist() == [[0]] and empty.balance_weights.tolist() == []
    assert build(SMALL, [0]).sequence_ids is None and build(SMALL, [0]).balance_weights is None
