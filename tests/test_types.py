"""What the records tell about themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dapo_mcore.types import FinishReason, Group, MicroBatch, Prompt, Rollout, Sample, Score, TrainBatch


def sample(finish_reason: FinishReason = "stop", version: int = 0, masked: bool = False) -> Sample:
    rollout = Rollout(
        np.array([5, 1], np.int32), np.zeros(2, np.float32), np.ones(2, bool), finish_reason, weight_version=version
    )
    return Sample(rollout, "", Score(reward=1.0, score=1.0, acc=True, masked=masked))


def test_a_response_is_truncated_if_its_length_ended_it() -> None:
    reasons: list[FinishReason] = ["stop", "length", "abort"]
    assert [sample(reason).rollout.truncated for reason in reasons] == [False, True, False]


@pytest.mark.parametrize(
    ("reason", "masked", "scored"),
    [("stop", False, True), ("length", False, True), ("abort", False, False), ("stop", True, False)],
)
def test_a_sample_counts_unless_its_scoring_failed_or_its_generation_was_aborted(
    reason: FinishReason, masked: bool, scored: bool
) -> None:
    assert sample(reason, masked=masked).scored is scored


def test_a_group_is_as_old_as_its_oldest_sample() -> None:
    prompt = Prompt("t:0", np.zeros(1, np.int32), "q", "7")
    assert Group(prompt, (sample(version=4), sample(version=2), sample(version=3))).weight_version == 2


def test_the_lengths_of_a_batch_and_its_loss_tokens() -> None:
    """Two samples: a prompt of 2 with a response of 3, of which one token is tool output; and 2 with 1."""
    batch = TrainBatch(
        tokens=np.arange(8, dtype=np.int32),
        loss_mask=np.array([0, 0, 1, 0, 1, 0, 0, 1], bool),
        rollout_logprobs=np.zeros(8, np.float32),
        offsets=np.array([0, 5, 8]),
        rewards=np.array([1.0, -1.0]),
        group_ids=np.array([0, 0]),
        in_statistics=np.array([True, True]),
    )
    assert batch.num_samples == 2
    assert batch.lengths.tolist() == [5, 3]
    assert batch.num_loss_tokens.tolist() == [2, 1] and batch.num_loss_tokens.dtype == np.int64


def test_a_changed_micro_batch_is_a_copy_that_shares_the_rest() -> None:
    fields = (
        "tokens",
        "position_ids",
        "rows",
        "targets",
        "advantages",
        "token_weights",
        "rollout_logprobs",
        "sample_ids",
    )
    before = MicroBatch(cu_seqlens=None, lengths=np.array([2, 3]), **{name: torch.zeros(3) for name in fields})
    after = before.with_(advantages=torch.ones(3), lengths=np.array([4]))
    assert (before.advantages.tolist(), before.max_seqlen) == ([0, 0, 0], 3)
    assert (after.advantages.tolist(), after.max_seqlen) == ([1, 1, 1], 4)
    assert after.tokens is before.tokens and after.old_logprobs is None
