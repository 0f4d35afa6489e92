"""Learning from one rollout step by hand: advantages, token weights and the order of gradient steps. The actor is made up."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dapo_mcore.actor.learner import Learner
from dapo_mcore.actor.scatter import MiniBatchPlan, SampleMetadata, ScatteredStep
from dapo_mcore.errors import RolloutError
from dapo_mcore.types import MicroBatch, TrainBatch
from tests.actor.parity import Mesh, make_config

ALONE = SimpleNamespace(
    context=1, context_rank=0, tensor=1, data_rank=0, reports_loss=True,
    sum_over_ranks=lambda values: values, max_over_ranks=lambda values: values,
)  # fmt: skip
LOSS_TOKENS = [1, 3, 2, 2]
REWARDS = [1.0, -1.0, 1.0, -1.0]


class MadeUpActor:
    """Scores every token with log-prob -0.5, and -1 by the reference policy if there is one. Notes the gradient steps."""

    def __init__(self, **overrides: Any):
        self.config, self.layout = make_config(Mesh(), **overrides), ALONE
        self.updates: list[Sequence[MicroBatch]] = []

    def score(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        return [
            micro.with_(
                old_logprobs=torch.full_like(micro.token_weights, -0.5),
                ref_logprobs=torch.full_like(micro.token_weights, -1.0) if self.config.algo.kl.coef else None,
            )
            for micro in micro_batches
        ]

    def update(self, micro_batches: Sequence[MicroBatch]) -> int:
        self.updates.append(micro_batches)
        return len(self.updates)


def step() -> ScatteredStep:
    """Return two groups of two samples, a gradient step each. A sample is one prompt token and its loss tokens.

    The samples of the first mini-batch are in micro-batches of their own, those of the second in one.
    """
    lengths = np.array(LOSS_TOKENS) + 1
    offsets = np.array([0, *np.cumsum(lengths)])
    mask = np.ones(offsets[-1], dtype=bool)
    mask[offsets[:-1]] = False
    groups, rewards, valid = np.array([0, 0, 1, 1]), np.array(REWARDS), np.ones(4, dtype=bool)
    batch = TrainBatch(
        np.arange(offsets[-1], dtype=np.int32), mask, np.where(mask, -0.25, 0).astype(np.float32), offsets, rewards,
        groups, valid,
    )  # fmt: skip
    plan = [
        MiniBatchPlan(np.array([0, 1]), [[[0], [1]]], np.array([0, 1])),
        MiniBatchPlan(np.array([2, 3]), [[[2, 3]]], np.array([0, 0])),
    ]
    metadata = SampleMetadata(lengths, np.array(LOSS_TOKENS), rewards, groups, valid)
    return ScatteredStep(metadata, plan, batch, np.arange(4), {sample: sample for sample in range(4)})


def by_sample(mini_batches: Sequence[Sequence[MicroBatch]], field: str) -> dict[int, list[float]]:
    """Return the field's values of each sample's loss tokens."""
    found: dict[int, list[float]] = {}
    for micro in (micro for mini in mini_batches for micro in mini):
        for sample, value in zip(micro.sample_ids.tolist(), getattr(micro, field).tolist(), strict=True):
            found.setdefault(sample, []).append(value)
    return found


def test_every_loss_token_gets_its_sample_s_advantage_and_its_mini_batch_s_weight():
    mini_batches = Learner(MadeUpActor(), pad_token=0).score(step()).mini_batches
    assert [len(mini) for mini in mini_batches] == [2, 1]
    # rewards 1 and -1: mean 0, standard deviation √2
    advantage = 1 / (2**0.5 + 1e-6)
    advantages = by_sample(mini_batches, "advantages")
    for sample, n in enumerate(LOSS_TOKENS):
        assert advantages[sample] == pytest.approx([REWARDS[sample] * advantage] * n)
    weights = by_sample(mini_batches, "token_weights")
    assert weights == {sample: [0.25] * n for sample, n in enumerate(LOSS_TOKENS)}, "four loss tokens per gradient step"


def test_a_loss_mode_weights_tokens_by_the_lengths_of_their_samples():
    built = Learner(MadeUpActor(), pad_token=0).build(step(), "seq-mean-token-mean")
    weights = by_sample(built, "token_weights")
    for sample, n in enumerate(LOSS_TOKENS):
        assert weights[sample] == pytest.approx([0.5 / n] * n), "1 / (2 samples · loss tokens)"


@pytest.mark.parametrize(("source", "old_logprob"), [("rollout", -0.25), ("actor", -0.5)])
def test_old_log_probs_of_the_rollout_need_no_scoring_pass(source, old_logprob):
    scored = Learner(MadeUpActor(algo__old_logprobs=source), pad_token=0).score(step())
    assert by_sample(scored.mini_batches, "old_logprobs") == {s: [old_logprob] * n for s, n in enumerate(LOSS_TOKENS)}
    mismatch = {"rollout": None, "actor": pytest.approx(0.25)}[source]
    assert scored.metrics.get("mismatch/logprob_diff_mean") == mismatch


def test_a_kl_in_the_reward_lowers_it_by_the_sum_over_the_sample_s_tokens():
    """k1 is old - reference = 0.5 per token. With coefficient 0.2 the rewards 1, -1 become 0.9, -1.3 and 0.8, -1.2."""
    actor = MadeUpActor(
        algo__kl__coef=0.2, algo__kl__place="reward", algo__kl__estimator="k1", algo__advantage_std="none"
    )
    found = by_sample(Learner(actor, pad_token=0).score(step()).mini_batches, "advantages")
    assert [found[sample][0] for sample in range(4)] == pytest.approx([1.1, -1.1, 1.0, -1.0])


def test_a_mismatch_above_the_limit_ends_the_run():
    with pytest.raises(RolloutError, match=r"0\.25"):
        Learner(MadeUpActor(algo__max_mismatch=0.2), pad_token=0).score(step())


def test_truncated_importance_weights_are_measured_over_the_step():
    actor = MadeUpActor(algo__old_logprobs="actor", algo__tis={"mode": "truncate", "cap": 0.5})
    metrics = Learner(actor, pad_token=0).score(step()).metrics
    assert metrics["tis/truncated_ratio"] == 1.0, "exp(-0.5 + 0.25) = 0.78 is above the cap everywhere"


def test_every_epoch_takes_one_gradient_step_per_mini_batch_in_order():
    actor = MadeUpActor(batch__epochs=2)
    learner = Learner(actor, pad_token=0)
    mini_batches = learner.score(step()).mini_batches
    assert learner.update(mini_batches) == [1, 2, 3, 4]
    assert [id(mini) for mini in actor.updates] == [id(mini) for mini in mini_batches] * 2
