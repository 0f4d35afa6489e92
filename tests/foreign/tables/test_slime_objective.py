"""What slime optimises, in our words, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from tests.foreign.slime_runs import imported, ours


def losses(flags: dict[str, Any]) -> dict[str, bool]:
    return imported({"lr-decay-style": "constant", **flags}).losses


def test_a_bound_that_is_unset_is_the_other() -> None:
    found = ours({"eps-clip": 0.1})
    assert (found["algo.clip_low"], found["algo.clip_high"], found["algo.dual_clip"]) == (0.1, 0.1, None)
    assert ours({"eps-clip-high": 0.28})["algo.clip_high"] == 0.28
    assert ours({})["algo.loss_mode"] == "seq-mean-token-mean"
    assert ours({"calculate-per-token-loss": True})["algo.loss_mode"] == "token-mean"


def test_a_coefficient_whose_switch_is_off_is_zero() -> None:
    assert ours({"kl-loss-coef": 0.1})["algo.kl.coef"] == 0
    on = ours({"kl-loss-coef": 0.1, "use-kl-loss": True})
    assert (on["algo.kl.coef"], on["algo.kl.place"], on["algo.kl.estimator"]) == (0.1, "loss", "k1")
    shaped = ours({"kl-coef": 0.2, "kl-loss-type": "low_var_kl"})
    assert (shaped["algo.kl.coef"], shaped["algo.kl.place"], shaped["algo.kl.estimator"]) == (0.2, "reward", "k3")
    assert losses({"kl-coef": 0.2, "kl-loss-coef": 0.1, "use-kl-loss": True}) == {"kl-coef": True}


def test_estimators() -> None:
    found = ours({"advantage-estimator": "gspo"})
    assert (found["algo.advantage"], found["algo.policy_loss"], found["algo.advantage_std"]) == (
        "group",
        "gspo",
        "unbiased",
    )
    assert ours({"disable-grpo-std-normalization": True})["algo.advantage_std"] == "none"
    critic = ours({"advantage-estimator": "ppo", "lambd": 0.9, "value-clip": 0.3})
    assert (critic["algo.advantage"], critic["algo.lam"], critic["critic.clip"]) == ("gae", 0.9, 0.3)
    lost = imported({"advantage-estimator": "reinforce_plus_plus"})
    assert lost.unaccepted([]) == ["advantage-estimator"]
    assert "algo.advantage" not in lost.values()


@pytest.mark.parametrize(
    "flag",
    ["use-opsm", "use-opd", "use-unbiased-kl", "disable-rewards-normalization", "custom-loss-function-path", "custom-generate-function-path",
     "normalize-advantages"],
)  # fmt: skip
def test_what_changes_the_objective_is_a_loss_of_it(flag: str) -> None:
    assert losses({flag: True}) == {flag: True}


def test_filters() -> None:
    assert ours({})["sampling.style"] == "none"
    path = "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"
    found = ours({"dynamic-sampling-filter-path": path, "over-sampling-batch-size": 16})
    assert (found["sampling.style"], found["sampling.gen_batch_prompts"], found["sampling.carry_surplus"]) == (
        "filter",
        16,
        False,
    )
    assert losses({"dynamic-sampling-filter-path": "mine.keep"}) == {"dynamic-sampling-filter-path": True}


def test_rewards_are_never_exchanged_in_silence() -> None:
    assert ours({"rm-type": "dapo"})["reward.function"] == "math_dapo"
    assert list(imported({"rm-type": "deepscaler"}).asked) == ["reward.function"]
    assert losses({"rm-type": "gpqa"}) == {"rm-type": True}
    assert losses({"custom-rm-path": "x.score"}) == {"custom-rm-path": True}
