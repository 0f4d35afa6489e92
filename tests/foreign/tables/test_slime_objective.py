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
    ppo = {"advantage-estimator": "ppo", "normalize-advantages": True}
    shaped = ours({**ppo, "kl-coef": 0.2, "kl-loss-type": "low_var_kl"})
    assert (shaped["algo.kl.coef"], shaped["algo.kl.place"], shaped["algo.kl.estimator"]) == (0.2, "reward", "k3")
    assert losses({**ppo, "kl-coef": 0.2, "kl-loss-coef": 0.1, "use-kl-loss": True}) == {"kl-coef": True}


def test_group_advantages_take_no_kl_from_rewards() -> None:
    """slime's get_grpo_returns spreads the reward over the tokens and leaves its argument `kl` unread."""
    assert ours({"kl-coef": 0.2})["algo.kl.coef"] == 0
    assert imported({"kl-coef": 0.2}).kind_of("kl-coef") == "meaningless"
    both = ours({"kl-coef": 0.2, "use-kl-loss": True, "kl-loss-coef": 0.1})
    assert (both["algo.kl.coef"], both["algo.kl.place"]) == (0.1, "loss")


def test_advantages_of_a_critic_are_whitened_only_by_a_flag() -> None:
    ppo = {"advantage-estimator": "ppo"}
    assert losses(ppo) == {"normalize-advantages": True}
    assert losses({**ppo, "normalize-advantages": True}) == {}
    critic = ours({**ppo, "lr": 3e-6, "adam-beta2": 0.95})
    assert (critic["critic.optimizer.lr"], critic["critic.optimizer.beta2"]) == (3e-6, 0.95)


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
    assert losses({"over-sampling-batch-size": 16}) == {"over-sampling-batch-size": False}
    assert losses({"over-sampling-batch-size": 8}) == {}, "as many as are trained on"


def test_unfinished_responses() -> None:
    apart = {"partial-rollout": True, "colocate": None, "rollout-num-gpus": 8}
    found = ours({**apart, "use-tis": True})
    assert (found["sampling.on_full"], found["sampling.carry_surplus"]) == ("keep", True)
    assert list(imported(apart).asked) == ["algo.tis.mode"], "they were begun by older weights"
    assert "algo.tis.mode" not in imported({**apart, "use-rollout-logprobs": True}).asked
    assert losses({"partial-rollout": True}) == {"partial-rollout": False}, "colocated servers give up their memory"
    ahead = imported({**apart, "use-tis": True}, "train_async.py").values()
    assert ahead["sampling.max_staleness"][0] == 2
    assert imported({**apart, "keep-old-actor": True}, "train_async.py").losses["keep-old-actor"] is True


def test_rewards_are_never_exchanged_in_silence() -> None:
    assert ours({"rm-type": "dapo", "reward-key": "score"})["reward.function"] == "math_dapo"
    for asked in ({"rm-type": "dapo", "reward-key": "acc"}, {"rm-type": "boxed_dapo"}, {"rm-type": None}):
        assert list(imported(asked).asked) == ["reward.function"]
    assert losses({"rm-type": "math", "reward-key": "x"}) == {"reward-key": True}
    assert list(imported({"rm-type": "deepscaler"}).asked) == ["reward.function"]
    assert losses({"rm-type": "gpqa"}) == {"rm-type": True}
    assert losses({"custom-rm-path": "x.score"}) == {"custom-rm-path": True}
    for other in ({"custom-rm-path": "x.score"}, {"rm-type": "gpqa"}):
        assert list(imported(other).asked) == ["reward.function"], "also once the loss is accepted"


def weights(flags: dict[str, Any]) -> dict[str, Any]:
    found = ours(flags)
    return {key.rpartition(".")[2]: value for key, value in found.items() if key.startswith("algo.tis.")}


def test_importance_weights() -> None:
    """run-glm5.2-744B-A40B.sh has the bounds; icepop_function has slime's bounds, whose lower one is 0 unless it is set."""
    bounds = {"use-tis": True, "tis-clip-low": 0.5, "tis-clip": 3.0}
    icepop = {"custom-tis-function-path": "slime.backends.megatron_utils.loss.icepop_function"}
    assert weights({"use-tis": True}) == {"mode": "truncate", "lower": None, "cap": 2.0}
    assert weights(bounds) == {"mode": "truncate", "lower": 0.5, "cap": 3.0}
    assert weights({**bounds, **icepop}) == {"mode": "icepop", "lower": 0.5, "cap": 3.0}
    assert weights({"use-tis": True, **icepop}) == {"mode": "icepop", "lower": 0, "cap": 2.0}
    assert weights({**icepop, "tis-clip": 3.0}) == {}
    assert losses({**bounds, **icepop}) == {}
    mine = {"custom-tis-function-path": "my.module.weights"}
    assert losses({**bounds, **mine}) == {"custom-tis-function-path": True}
    assert imported({**bounds, **mine}).kind_of("use-tis") == "asked", "its switch is not without effect"
