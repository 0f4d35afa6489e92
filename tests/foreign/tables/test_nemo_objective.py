"""What NeMo-RL optimises, in our words, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dapo_mcore.foreign.tables.nemo_objective import LOST_OF_THE_OBJECTIVE
from tests.foreign.nemo_runs import imported, ours

DAPO = {"env.math.math_verify_impl": "dapo_math_verify", "data.default.prompt_file": None}
SCALED = {"grpo.reward_scaling.enabled": True, "grpo.reward_scaling.target_min": -1.0}


def losses(settings: dict[str, Any]) -> dict[str, bool]:
    return imported({**DAPO, **settings}).losses


def test_the_papers_reward_is_the_rule_scaled_to_one() -> None:
    assert ours({**DAPO, **SCALED})["reward.function"] == "math_dapo"
    assert "reward.function" in imported(DAPO).asked
    assert losses({**SCALED, "grpo.reward_scaling.target_max": 5.0}) == {"grpo.reward_scaling.enabled": True}
    assert losses({"data.default.env_name": "code"}) == {"data.default.env_name": True}
    assert "reward.function" in imported({**DAPO, **SCALED, "data.train.env_name": "code"}).asked


def test_overlong_punishment() -> None:
    place = "grpo.reward_shaping"
    found = ours({f"{place}.enabled": True, f"{place}.overlong_buffer_length": 64, f"{place}.max_response_length": 900})
    assert {key: value for key, value in found.items() if "overlong" in key} == {
        "reward.overlong.penalty": True, "reward.overlong.cache": 64, "reward.overlong.factor": 1, "reward.overlong.max_length": 900,
    }  # fmt: skip
    assert "reward.overlong.cache" not in ours({f"{place}.overlong_buffer_length": 64})
    stop = {f"{place}.enabled": True, f"{place}.stop_properly_penalty_coef": 0.0}
    assert losses(stop) == {f"{place}.stop_properly_penalty_coef": True}, "0 takes all reward from truncated responses"
    assert "reward.overlong.penalty" not in ours(stop)
    assert losses({f"{place}.stop_properly_penalty_coef": 0.5}) == {}, "shaping is off"


def test_estimators() -> None:
    found = ours({"grpo.normalize_rewards": False, "grpo.use_leave_one_out_baseline": True})
    assert (found["algo.advantage"], found["algo.advantage_std"], found["algo.advantage_baseline"]) == (
        "group",
        "none",
        "leave-one-out",
    )
    assert ours({"grpo.use_leave_one_out_baseline": False})["algo.advantage_baseline"] == "mean"
    assert losses({"grpo.adv_estimator.name": "reinforce_plus_plus"}) == {"grpo.adv_estimator.name": True}


def test_the_std_is_that_of_the_others_with_a_leave_one_out_baseline() -> None:
    assert ours({})["algo.advantage_std"] == "others"  # both are NeMo-RL's defaults
    assert ours({"grpo.use_leave_one_out_baseline": False})["algo.advantage_std"] == "unbiased"
    assert losses({}) == {}


def test_policy_losses_and_kl() -> None:
    found = ours({"loss_fn.ratio_clip_max": 0.28, "loss_fn.token_level_loss": False, "loss_fn.use_cispo": True})
    assert (found["algo.clip_low"], found["algo.clip_high"], found["algo.policy_loss"]) == (0.2, 0.28, "cispo")
    assert found["algo.loss_mode"] == "seq-mean-token-mean"
    assert (found["algo.kl.coef"], found["algo.kl.estimator"], found["algo.kl.place"]) == (0.01, "k2", "loss")
    assert ours({"loss_fn.reference_policy_kl_penalty": 0.0})["algo.kl.coef"] == 0
    assert losses({"loss_fn.kl_output_clamp_value": 5.0}) == {"loss_fn.kl_output_clamp_value": True}
    assert losses({"loss_fn.use_on_policy_kl_approximation": True}) == {"loss_fn.use_on_policy_kl_approximation": True}
    off = {
        "loss_fn.reference_policy_kl_penalty": 0,
        "loss_fn.use_on_policy_kl_approximation": True,
        "loss_fn.kl_output_clamp_value": 5.0,
    }
    assert losses(off) == {}, "without a penalty neither says anything"
    assert ours({"loss_fn.use_kl_in_reward": True})["algo.kl.coef"] == 0, "its estimator grpo takes no KL from rewards"


def test_the_gradient_of_its_kl_is_that_of_k2() -> None:
    """loss_functions.py weighs the KL by exp(p - p.detach()), which is 1 and whose gradient is that of the sampling."""
    p = torch.tensor([-1.3, -0.4, -2.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.0, -0.9, -2.0], dtype=torch.float64)
    log_ratio = reference - p
    theirs = (torch.exp(p - p.detach()) * (log_ratio.exp() - 1 - log_ratio)).sum()
    ours = ((p - reference) ** 2 / 2).sum()
    (found,), (expected,) = torch.autograd.grad(theirs, p), torch.autograd.grad(ours, p)
    torch.testing.assert_close(found, expected)
    assert losses({"loss_fn.reference_policy_kl_type": "k2"}) == {"loss_fn.reference_policy_kl_type": True}


def test_a_ratio_of_1_by_force_needs_one_gradient_step() -> None:
    force = {
        "loss_fn.force_on_policy_ratio": True,
        "grpo.num_prompts_per_step": 32,
        "grpo.num_generations_per_prompt": 16,
    }
    assert losses({**force, "policy.train_global_batch_size": 512}) == {}
    assert losses({**force, "policy.train_global_batch_size": 256}) == {"loss_fn.force_on_policy_ratio": True}


def test_log_probs_within_a_nucleus_are_lost() -> None:
    assert losses({"policy.generation.top_p": 0.9}) == {"policy.generation.top_p": True}
    assert losses({"policy.generation.top_k": 50}) == {"policy.generation.top_k": True}
    assert losses({"policy.generation.top_p": 1.0, "policy.generation.top_k": None}) == {}


def test_scaled_rewards_of_another_rule_are_asked_for() -> None:
    assert "reward.function" in imported({**SCALED, "env.math.math_verify_impl": "hf_math_verify"}).asked


@pytest.mark.parametrize("key", LOST_OF_THE_OBJECTIVE)
def test_what_is_not_here_is_a_loss_of_the_objective(key: str) -> None:
    assert losses({key: 0.5}) == {key: True}


def test_a_bound_of_0_is_a_bound() -> None:
    assert losses({"grpo.advantage_clip_low": 0.0}) == {"grpo.advantage_clip_low": True}
    assert losses({"grpo.advantage_clip_low": None, "loss_fn.positive_example_nll_weight": 0.0}) == {}


TIS = "loss_fn.truncated_importance_sampling"
BOUNDS = {f"{TIS}_ratio": 1.002, f"{TIS}_ratio_min": 0.999}
GEOMETRIC = {"level": "geometric", "lower": 0.999, "upper": 1.002}


@pytest.mark.parametrize(
    ("settings", "tis", "rejection"),
    [
        ({}, {"mode": "truncate", "cap": None}, None),
        ({f"{TIS}_type": "tis", **BOUNDS}, {"mode": "truncate", "lower": 0.999, "cap": 1.002}, None),
        ({f"{TIS}_type": "icepop", **BOUNDS}, {"mode": "icepop", "lower": 0.999, "cap": 1.002}, None),
        ({f"{TIS}_type": "seq-mask-tis", **BOUNDS}, {"mode": "truncate", "cap": None}, [GEOMETRIC]),
        (
            {"loss_fn.sequence_level_importance_ratios": True, "loss_fn.token_level_loss": False},
            {"mode": "truncate", "level": "sequence", "cap": None},
            None,
        ),
    ],
)
def test_importance_weights(settings: dict[str, Any], tis: dict[str, Any], rejection: Any) -> None:
    run = {"loss_fn.use_importance_sampling_correction": True, **settings}
    found = ours(run)
    assert {key.rpartition(".")[2]: value for key, value in found.items() if key.startswith("algo.tis.")} == tis
    assert found.get("algo.rejection") == rejection and losses(run) == {}
    assert found.get("algo.rejection_divisor") == ("all" if rejection else None)


def test_reinforce_is_cispo_whose_ratio_is_clipped_to_1() -> None:
    run = {"loss_fn.disable_ppo_ratio": True, "loss_fn.ratio_clip_max": 0.28}
    found = ours(run)
    assert (found["algo.policy_loss"], found["algo.clip_low"], found["algo.clip_high"]) == ("cispo", 0.0, 0.0)
    assert losses(run) == {}


def test_corrections() -> None:
    switch = {"loss_fn.use_importance_sampling_correction": True}
    cap = {"loss_fn.truncated_importance_sampling_ratio": 3.0}
    found = ours({**switch, **cap})
    assert (found["algo.tis.mode"], found["algo.tis.cap"]) == ("truncate", 3.0)
    unknown = {**switch, **cap, f"{TIS}_type": "vtrace"}
    assert losses(unknown) == {f"{TIS}_type": True}
    ahead = {"grpo.async_grpo.enabled": True, "policy.generation.colocated.enabled": False}
    assert "rollout.async_steps" in imported({"grpo.async_grpo.enabled": True}).asked, (
        "servers there need GPUs of their own"
    )
    assert "algo.tis.mode" in imported({**ahead, **unknown}).asked
    assert ours(ahead)["rollout.async_steps"] == 1
    assert "algo.tis.mode" in imported(ahead).asked and "algo.tis.mode" not in imported({**ahead, **switch}).asked


def test_another_environment_is_lost_by_one_name() -> None:
    game = {"env.sliding_puzzle_game.cfg.max_moves": 30, "env.sliding_puzzle_game.cfg.size": 5}
    assert losses(game) == {"env.sliding_puzzle_game.cfg.max_moves": True}
    gym = {"env.should_use_nemo_gym": True, "env.should_log_nemo_gym_responses": True, "env.nemo_gym.num_gpu_nodes": 1}
    assert losses(gym) == {"env.should_use_nemo_gym": True}
    assert losses({"env.dapo.num_workers": 8, "env.should_use_nemo_gym": False}) == {}
    assert losses({"env.math.verifier_type": "english"}) == {"env.math.verifier_type": True}
