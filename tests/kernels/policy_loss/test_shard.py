"""Which columns of the vocabulary a rank holds. The collectives over ranks: ../policy_head/test_tensor_parallel.py."""

from __future__ import annotations

import pytest
import torch
from dapo_mcore.kernels.policy_loss import shard
from dapo_mcore.kernels.policy_loss.shard import VocabShard, check_targets


@pytest.mark.parametrize(
    ("rank", "vocab_size", "start", "num_real"),
    [(0, 6, 0, 4), (1, 6, 4, 2), (2, 6, 8, 0), (2, None, 8, 4), (2, 12, 8, 4), (0, 3, 0, 3)],
)
def test_padding_is_at_the_end_of_the_last_ranks(rank, vocab_size, start, num_real, monkeypatch):
    """Three ranks with 4 columns each."""
    monkeypatch.setattr(shard.dist, "get_rank", lambda group: rank)
    monkeypatch.setattr(shard.dist, "get_world_size", lambda group: 3)
    found = VocabShard.of(4, vocab_size, group="three ranks")
    assert (found.start, found.num_real, found.num_ranks) == (start, num_real, 3)


@pytest.mark.parametrize("vocab_size", [0, 13])
def test_a_vocabulary_larger_than_all_columns_is_refused(vocab_size, monkeypatch):
    monkeypatch.setattr(shard.dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(shard.dist, "get_world_size", lambda group: 3)
    with pytest.raises(
        ValueError, match=rf"vocab_size {vocab_size} .* the 12 rows there are: 4 weight rows on each of 3"
    ):
        VocabShard.of(4, vocab_size, group="three ranks")


def test_one_rank_and_no_tokens_need_no_collective():
    alone, empty = VocabShard.of(4, None, None), VocabShard(4, 4, None, num_ranks=3)
    statistics = torch.arange(8.0).view(4, 2)
    assert torch.equal(alone.all_gather(statistics), statistics[None])
    assert alone.start_sum(statistics) is None
    assert empty.all_gather(statistics[:, :0]).shape == (1, 4, 0)
    assert empty.start_sum(statistics[:0]) is None


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.zeros(5, dtype=torch.int64), r"targets must be int64 \[4\] on cpu.* \[5\]"),
        (torch.zeros(4, dtype=torch.int32), "got torch.int32"),
        (torch.zeros(4, dtype=torch.int64, device="meta"), "on meta"),
        (torch.tensor([0, 1, 5, 3]), "0 … 4, the vocabulary, but span 0 … 5"),
        (torch.tensor([0, -1, 4, 3]), "0 … 4, the vocabulary, but span -1 … 4"),
    ],
)
def test_targets_that_are_no_tokens_are_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        check_targets(targets, 4, torch.device("cpu"), vocab_size=5)


def test_every_token_of_the_vocabulary_may_be_a_target():
    check_targets(torch.tensor([0, 4]), 2, torch.device("cpu"), vocab_size=5)
    check_targets(torch.zeros(0, dtype=torch.int64), 0, torch.device("cpu"), vocab_size=5)
