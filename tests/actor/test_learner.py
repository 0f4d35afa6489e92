"""Learning from one rollout step by hand: advantages, token weights and the order of gradient steps. The actor is made up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dapo_mcore.actor.learner import Learner
from dapo_mcore.actor.metrics import update_metrics
from dapo_mcore.actor.scatter import MiniBatchPlan, SampleMetadata, ScatteredStep
from dapo_mcore.actor.update_guard import Verdict
from dapo_mcore.algo.correction import mismatch_metrics, mismatch_stats
from dapo_mcore.config.algo import TISConfig
from dapo_mcore.errors import RolloutError
from dapo_mcore.types import MicroBatch, TrainBatch
from tests.actor import parity
from tests.actor.parity import Mesh, make_config

ALONE = SimpleNamespace(
    context=1, context_rank=0, tensor=1, data_rank=0, reports_loss=True,
    sum_over_ranks=lambda values: values, max_over_ranks=lambda values: values,
)  # fmt: skip
LOSS_TOKENS = [1, 3, 2, 2]
REWARDS = [1.0, -1.0, 1.0, -1.0]


class MadeUpActor:
    """Scores every token with log-prob -0.5, and -1 by the reference policy if there is one. Notes the gradient steps.

    A gradient step finds log-probs of its own, -0.3.
    """

    critic = None

    def __init__(self, **overrides: Any):
        self.config, self.layout = make_config(Mesh(), **overrides), ALONE
        self.updates: list[Sequence[MicroBatch]] = []

    def score(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        return [micro.with_(old_logprobs=torch.full_like(micro.token_weights, -0.5)) for micro in micro_batches]

    def score_reference(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        if not self.config.algo.kl.coef:
            return list(micro_batches)
        return [micro.with_(ref_logprobs=torch.full_like(micro.token_weights, -1.0)) for micro in micro_batches]

    def update(self, micro_batches: Sequence[MicroBatch], *, check: Any = None, **_: Any) -> Any:
        own = [torch.full_like(micro.token_weights, -0.3) for micro in micro_batches]
        rollout = torch.cat([micro.rollout_logprobs for micro in micro_batches])
        mismatch = mismatch_stats(torch.cat(own), rollout)
        stats = SimpleNamespace(mismatch=mismatch, logprobs=own, verdict=Verdict.TAKEN)
        if check is not None:
            check(stats)
        self.updates.append(micro_batches)
        return stats


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


def by_sample(mini_batches: Sequence[Sequence[MicroBatch]], field: str) -> dict[int, list[float | None]]:
    """Return the field's values of each sample's loss tokens."""
    found: dict[int, list[float | None]] = {}
    for micro in (micro for mini in mini_batches for micro in mini):
        values = getattr(micro, field)
        values = [None] * len(micro.sample_ids) if values is None else values.tolist()
        for sample, value in zip(micro.sample_ids.tolist(), values, strict=True):
            found.setdefault(sample, []).append(value)
    return found


def test_every_sample_gets_its_mini_batch_s_weight_of_the_load_balancing_loss():
    (first, second), (third,) = (
        Learner(MadeUpActor(model__moe_aux_loss_coef=0.1), pad_token=0).score(step()).mini_batches
    )
    weights = torch.cat([micro.balance_weights for micro in (first, second, third)])
    # two samples in each mini-batch, of 2, 4, 3 and 3 tokens
    torch.testing.assert_close(weights, torch.tensor([1 / 8, 1 / 32, 1 / 18, 1 / 18]))
    assert Learner(MadeUpActor(), pad_token=0).score(step()).mini_batches[0][0].balance_weights is None


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


ALL, REST, NONE = {0, 1, 2, 3}, {2, 3}, set()


@pytest.mark.parametrize(
    ("overrides", "samples"),
    [
        ({"algo__old_logprobs": "actor"}, REST),
        ({"algo__old_logprobs": "actor", "algo__kl__coef": 0.1}, REST),
        ({"algo__old_logprobs": "actor", "batch__epochs": 2}, REST),
        ({"algo__old_logprobs": "actor", "batch__epochs": 2, "model__routing_replay": "scoring"}, ALL),
        ({"algo__old_logprobs": "actor", "algo__kl": {"coef": 0.1, "place": "reward"}}, ALL),
        ({"algo__old_logprobs": "rollout", "algo__kl": {"coef": 0.1, "place": "reward"}}, ALL),
        ({"algo__old_logprobs": "rollout"}, NONE),
        ({"algo__old_logprobs": "rollout", "algo__kl__coef": 0.1}, NONE),
        ({"algo__old_logprobs": "rollout", "algo__tis__mode": "mask"}, REST),
        ({"algo__old_logprobs": "rollout", "algo__max_mismatch": 0.3}, REST),
    ],
    ids=str,
)
def test_only_mini_batches_whose_scores_are_read_are_scored(overrides, samples):
    actor = MadeUpActor(**overrides)
    scored = Learner(actor, pad_token=0).score(step())
    old = {sample: [-0.5 if sample in samples else None] * n for sample, n in enumerate(LOSS_TOKENS)}
    assert by_sample(scored.mini_batches, "old_logprobs") == old
    reference = -1.0 if actor.config.algo.kl.coef else None
    assert by_sample(scored.mini_batches, "ref_logprobs") == {s: [reference] * n for s, n in enumerate(LOSS_TOKENS)}
    found = mismatch_metrics(scored.mismatch).get("mismatch/logprob_diff_mean")
    assert found == (pytest.approx(0.25) if samples else None), "of the mini-batches after the first"


def test_a_step_of_one_gradient_step_is_not_scored_at_all():
    one = replace(step(), plan=step().plan[:1])
    scored = Learner(MadeUpActor(algo__old_logprobs="actor", algo__max_mismatch=1.0), pad_token=0).score(one)
    assert all(micro.old_logprobs is None for micro in scored.mini_batches[0])
    assert mismatch_metrics(scored.mismatch) == {}


@pytest.mark.parametrize("epochs", [1, 2])
def test_gradient_steps_and_metrics_are_those_of_a_step_that_is_scored_whole(alone, epochs):
    """Also in a second epoch, where the old log-probs of the first mini-batch are those of its first gradient step."""
    overrides = {"algo__old_logprobs": "actor", "algo__tis": {"mode": "truncate", "cap": 0.01}, "batch__epochs": epochs}
    config = make_config(Mesh(), batch__mini_batch_prompts=2, **overrides)
    weights, metrics = [], []
    for whole in (False, True):
        actor = parity.build_actor(config, alone)
        learner = Learner(actor, pad_token=0)
        scored = parity.scored_step(config, alone, parity.make_batch(), actor)
        every = [actor.score(mini) for mini in scored.mini_batches]
        flat = [micro for mini in every for micro in mini]
        old, rollout = (torch.cat([getattr(m, f"{name}_logprobs") for m in flat]) for name in ("old", "rollout"))
        updates = learner.update(replace(scored, mini_batches=every) if whole else scored)
        metrics.append(update_metrics(updates, scored.mismatch))
        weights.append([parameter.detach().clone() for parameter in actor.policy.parameters()])
    assert len(updates) == 2 * epochs and all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert metrics[0] == metrics[1] and metrics[0]["actor/first_update_ratio_deviation"] == 0.0
    expected = mismatch_metrics(mismatch_stats(old, rollout, TISConfig(mode="truncate", cap=0.01)))
    assert 0 < expected["tis/truncated_ratio"] < 1
    assert {name: metrics[0][name] for name in expected} == pytest.approx(expected, rel=1e-12)


def test_a_kl_in_the_reward_lowers_it_by_the_sum_over_the_sample_s_tokens():
    """k1 is old - reference = 0.5 per token. With coefficient 0.2 the rewards 1, -1 become 0.9, -1.3 and 0.8, -1.2."""
    actor = MadeUpActor(
        algo__kl__coef=0.2, algo__kl__place="reward", algo__kl__estimator="k1", algo__advantage_std="none"
    )
    found = by_sample(Learner(actor, pad_token=0).score(step()).mini_batches, "advantages")
    assert [found[sample][0] for sample in range(4)] == pytest.approx([1.1, -1.1, 1.0, -1.0])


def test_a_mismatch_above_the_limit_over_the_whole_step_ends_the_run_before_the_first_gradient_step():
    """0.05 for the four tokens of the first gradient step, which finds it itself, and 0.25 for the four that were scored."""
    for limit in (0.2, 0.14):
        actor = MadeUpActor(algo__max_mismatch=limit)
        learner = Learner(actor, pad_token=0)
        scored = learner.score(step())
        if limit > 0.15:
            assert len(learner.update(scored)) == len(actor.updates) == 2
            continue
        with pytest.raises(RolloutError, match=r"mean 0\.15 nats"):
            learner.update(scored)
        assert actor.updates == []


def test_every_epoch_takes_one_gradient_step_per_mini_batch_in_order():
    actor = MadeUpActor(batch__epochs=2, algo__old_logprobs="actor")
    learner = Learner(actor, pad_token=0)
    scored = learner.score(step())
    assert len(learner.update(scored)) == 4
    assert [[micro.targets.tolist() for micro in mini] for mini in actor.updates] == [
        [micro.targets.tolist() for micro in mini] for mini in scored.mini_batches
    ] * 2
    old = [by_sample([mini], "old_logprobs") for mini in actor.updates]
    first, again = ({0: [value], 1: [value] * 3} for value in (None, float(torch.tensor(-0.3))))
    assert old == [first, {2: [-0.5] * 2, 3: [-0.5] * 2}, again, {2: [-0.5] * 2, 3: [-0.5] * 2}]
