"""verl's objective in our words: what is kept, and what must never become GRPO silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dapo_mcore.foreign.convert import convert
from dapo_mcore.foreign.settings import ForeignRun, ForeignSetting
from dapo_mcore.foreign.tables.verl import VERL
from tests.foreign.verl_runs import GRPO, A, R, imported, lost, ours


@pytest.mark.parametrize(
    ("estimator", "keys"),
    [
        ("grpo", {"algo.advantage": "group", "algo.advantage_std": "unbiased"}),
        ("rloo", {"algo.advantage_baseline": "leave-one-out", "algo.advantage_std": "none"}),
        ("reinforce_plus_plus_baseline", {"algo.advantage": "group", "algo.advantage_std": "batch"}),
        ("gae", {"algo.advantage": "gae", "algo.gamma": 1.0, "algo.lam": 1.0}),
    ],
)
def test_estimators_that_exist_here(estimator: str, keys: dict[str, Any]) -> None:
    found = ours({"algorithm.adv_estimator": estimator})
    assert {key: found[key] for key in keys} == keys


@pytest.mark.parametrize("estimator", ["remax", "opo", "gpg", "grpo_passk", "reinforce_plus_plus", "psr_nsr", "my_own"])
def test_an_estimator_that_does_not_is_lost_with_its_objective(estimator: str) -> None:
    settings = {"algorithm.adv_estimator": estimator}
    assert lost(settings) == {"algorithm.adv_estimator": True}
    assert not any(key.startswith("algo.advantage") for key in ours(settings))


def test_dr_grpo() -> None:
    assert ours({"algorithm.norm_adv_by_std_in_grpo": False})["algo.advantage_std"] == "none"


@pytest.mark.parametrize("name", ["geo_mean", "sapo", "gpg", "my_own"])
def test_an_unknown_policy_loss_is_lost_with_its_objective(name: str) -> None:
    assert lost({f"{A}.policy_loss.loss_mode": name}) == {f"{A}.policy_loss.loss_mode": True}
    assert "algo.policy_loss" not in ours({f"{A}.policy_loss.loss_mode": name})


def test_kl_cov_under_both_of_its_names() -> None:
    new = ours({f"{A}.policy_loss.loss_mode": "kl_cov", f"{A}.policy_loss.kl_cov_ratio": 0.002})
    old = ours({f"{A}.loss_mode": "kl_cov", f"{A}.k_percent": 0.2, f"{A}.ppo_kl_coef": 1})
    assert (new["algo.policy_loss"], new["algo.kl_cov"]) == ("kl_cov", {"ratio": 0.002, "coef": 0.1})
    assert old["algo.kl_cov"] == {"ratio": 0.002, "coef": 1}
    assert "algo.dual_clip" not in new


def test_clip_cov() -> None:
    found = ours({f"{A}.policy_loss.loss_mode": "clip_cov", f"{A}.policy_loss.clip_cov_ub": 4.0})
    assert found["algo.clip_cov"] == {"ratio": 0.0002, "lower": 1.0, "upper": 4.0}


def test_verls_dual_clip_is_3_if_unset_and_gspo_has_none() -> None:
    assert ours({})["algo.dual_clip"] == 3.0
    gspo = ours({f"{A}.policy_loss.loss_mode": "gspo"})
    assert "algo.dual_clip" not in gspo and gspo["algo.loss_mode"] == "seq-mean-token-mean"


@pytest.mark.parametrize(
    ("settings", "kl"),
    [
        ({f"{A}.kl_loss_coef": 0.001}, {"algo.kl.coef": 0.0}),
        ({f"{A}.use_kl_loss": False, f"{A}.kl_loss_coef": 0.5}, {"algo.kl.coef": 0.0}),
        ({"algorithm.use_kl_in_reward": False, "algorithm.kl_ctrl.kl_coef": 0.2}, {"algo.kl.coef": 0.0}),
        (
            {f"{A}.use_kl_loss": True, f"{A}.kl_loss_coef": 0.02},
            {"algo.kl.coef": 0.02, "algo.kl.place": "loss", "algo.kl.estimator": "k3"},
        ),
        (
            {f"{A}.use_kl_loss": True, f"{A}.kl_loss_type": "mse"},
            {"algo.kl.coef": 0.001, "algo.kl.place": "loss", "algo.kl.estimator": "k2"},
        ),
        (
            {"algorithm.use_kl_in_reward": True, "algorithm.kl_ctrl.kl_coef": 0.1},
            {"algo.kl.coef": 0.1, "algo.kl.place": "reward", "algo.kl.estimator": "k1"},
        ),
        ({}, {}),
    ],
)
def test_a_kl_coefficient_counts_only_if_its_switch_is_on(settings: dict[str, Any], kl: dict[str, Any]) -> None:
    assert {key: value for key, value in ours(settings).items() if key.startswith("algo.kl.")} == kl


def test_kls_that_cannot_be_had() -> None:
    both = {"algorithm.use_kl_in_reward": True, f"{A}.use_kl_loss": True}
    assert lost(both) == {"algorithm.use_kl_in_reward": True}
    assert lost({f"{A}.use_kl_loss": True, f"{A}.kl_loss_type": "abs"}) == {f"{A}.kl_loss_type": True}
    adaptive = {"algorithm.use_kl_in_reward": True, "algorithm.kl_ctrl.type": "adaptive"}
    assert lost(adaptive) == {"algorithm.kl_ctrl.type": True}
    numbers = {"algorithm.kl_ctrl.target_kl": 0.1, "algorithm.kl_ctrl.horizon": 10000}
    conversion = imported({**GRPO, **adaptive, **numbers})
    assert {conversion.kind_of(key) for key in numbers} == {"lost"}, "they go with their switch"


def test_adaptive_entropy() -> None:
    place = f"{A}.adaptive_entropy"
    settings = {f"{place}.enabled": True, f"{place}.target_entropy": 0.2, f"{place}.max_ent_coef": 0.005}
    assert ours(settings)["algo.adaptive_entropy"] == {"target": 0.2, "max_coef": 0.005}
    assert "algo.adaptive_entropy" not in ours({**settings, f"{place}.enabled": False})


def test_rewards() -> None:
    assert ours({})["reward.function"] == "by_source"
    own = {"custom_reward_function.path": "my/score.py", "custom_reward_function.name": "rate"}
    assert ours(own)["reward.function"] == "my/score.py:rate"
    assert ours({"custom_reward_function.path": "score.py"})["reward.function"] == "score.py:compute_score"
    kwargs = {**own, "custom_reward_function.reward_kwargs.scale": 2}
    assert ours(kwargs)["reward.kwargs"] == {"scale": 2}
    assert lost({"reward_model.reward_manager": "yr"}) == {"reward_model.reward_manager": True}
    assert lost({"reward_model.enable": True}) == {"reward_model.enable": True}


@pytest.mark.parametrize(
    "place",
    [
        "reward_model.overlong_buffer",
        "reward_model.reward_kwargs.overlong_buffer_cfg",
        "reward.reward_kwargs.overlong_buffer_cfg",
    ],
)
def test_overlong_punishment_under_the_names_of_three_versions(place: str) -> None:
    settings = {f"{place}.enable": True, f"{place}.len": 4096, f"{place}.penalty_factor": 0.5, f"{place}.log": False}
    found = {key: value for key, value in ours(settings).items() if key.startswith("reward.overlong")}
    assert found == {
        "reward.overlong.penalty": True, "reward.overlong.cache": 4096, "reward.overlong.factor": 0.5,
    }  # fmt: skip
    assert not any(key.startswith("reward.overlong") for key in ours({**settings, f"{place}.enable": False}))


def test_clip_ratio_alone_is_asked_for() -> None:
    assert ours({f"{A}.clip_ratio": 0.2})["algo.clip_low"] == 0.2
    found = ours({f"{A}.clip_ratio": 0.3, f"{A}.clip_ratio_high": 0.28})
    assert "algo.clip_low" not in found and found["algo.clip_high"] == 0.28


def test_a_bound_of_null_is_clip_ratio() -> None:
    found = ours({f"{A}.clip_ratio": 0.3, f"{A}.clip_ratio_low": None, f"{A}.clip_ratio_high": None})
    assert (found["algo.clip_low"], found["algo.clip_high"]) == (0.3, 0.3)


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce_plus_plus_baseline"])
def test_one_response_per_prompt_has_no_group(estimator: str) -> None:
    """verl then takes the reward itself; the advantage against a group of one would be 0."""
    assert lost({"algorithm.adv_estimator": estimator, f"{R}.n": 1}) == {f"{R}.n": True}
    assert imported({"algorithm.adv_estimator": estimator}).losses == {"algorithm.adv_estimator": True}
    assert imported({"algorithm.adv_estimator": "gae", f"{R}.n": 1}).losses == {}


def test_the_length_of_the_norm_holds_for_new_workers() -> None:
    """dp_actor.py of b178a3c passes no loss_scale_factor to agg_loss; only verl/workers/utils/losses.py does."""
    norm = {f"{A}.loss_agg_mode": "seq-mean-token-sum-norm", f"{A}.loss_scale_factor": 4096}
    assert "algo.loss_length" not in ours(norm)
    assert ours({**norm, "trainer.use_legacy_worker_impl": "disable"})["algo.loss_length"] == 4096


def test_megatrons_old_workers_weigh_micro_batches_alike() -> None:
    settings = {**GRPO, f"{A}.loss_agg_mode": "seq-mean-token-mean", f"{A}.use_dynamic_bsz": True}
    for strategy, workers, told in (
        ("megatron", "auto", True),
        ("fsdp", "auto", False),
        ("megatron", "disable", False),
    ):
        run = {**settings, f"{A}.strategy": strategy, "trainer.use_legacy_worker_impl": workers}
        (outcome,) = [outcome for outcome in imported(run).outcomes if outcome.ours == "algo.loss_mode"]
        assert outcome.value == "seq-mean-token-mean" and ("alike" in outcome.note) == told


def test_a_kl_whose_switch_is_unknown_is_one_question() -> None:
    settings = (
        ForeignSetting("algorithm.adv_estimator", "grpo", "run.sh line 1"),
        ForeignSetting(f"{A}.use_kl_loss", "${KL}", "run.sh line 2", ("KL",)),
        ForeignSetting(f"{A}.kl_loss_coef", 0.01, "run.sh line 3"),
    )
    conversion = convert(ForeignRun("verl", Path("run.sh"), "verl.trainer.main_ppo", "", settings), VERL)
    assert [key for key in conversion.asked if key.startswith("algo.")] == ["algo.kl.coef"]
    assert "0.01 if use_kl_loss" in conversion.asked["algo.kl.coef"].note
    assert conversion.values()["algo.kl.estimator"][0] == "k3"


def test_a_loss_whose_switch_is_unknown_is_a_loss() -> None:
    """Nothing that the script takes from outside may be dropped without a word."""
    for key, value in (
        ("reward_model.enable", "${RM}"),
        ("data.custom_cls.path", "${ROOT}/d.py"),
        ("config-name", "${1}"),
    ):
        unknown = ForeignSetting(key, value, "run.sh line 1", ("X",))
        run = ForeignRun("verl", Path("run.sh"), "verl.trainer.main_ppo", "", (unknown,))
        assert convert(run, VERL).losses == {key: True}


def test_arguments_of_a_reward_function_as_one_mapping() -> None:
    settings = {"custom_reward_function.path": "r.py", "custom_reward_function.reward_kwargs": {"scale": 2}}
    assert ours(settings)["reward.kwargs"] == {"scale": 2}
    newer = {"reward.custom_reward_function.path": "r.py", "reward.custom_reward_function.name": "rate"}
    assert ours(newer)["reward.function"] == "r.py:rate"


def test_tools_are_lost_wherever_verl_has_them() -> None:
    """b178a3c puts the schemas of tool_config_path into prompts whatever `enable` says."""
    file, talks, agent = (
        f"{R}.multi_turn.tool_config_path",
        f"{R}.multi_turn.interaction_config_path",
        f"{R}.agent.default_agent_loop",
    )
    for settings, key in (
        ({f"{R}.multi_turn.enable": True, file: "tools.yaml"}, file),
        ({f"{R}.multi_turn.enable": False, file: "tools.yaml"}, file),
        ({f"{R}.multi_turn.enable": True}, f"{R}.multi_turn.enable"),
        ({f"{R}.multi_turn.enable": True, talks: "talks.yaml"}, talks),
        ({agent: "tool_agent"}, agent),
    ):
        assert lost(settings) == {key: True}
    for nothing in ({f"{R}.multi_turn.enable": False, file: None}, {talks: "talks.yaml"}, {agent: "single_turn_agent"}):
        assert lost(nothing) == {}


def test_another_program_may_optimise_something_else() -> None:
    assert lost({}, entry="recipe.sppo.main_sppo") == {"recipe.sppo.main_sppo": True}
    assert lost({}, entry="recipe.dapo.main_dapo") == {}


def test_a_kl_with_a_plus_has_the_gradient_of_k2() -> None:
    for kind in ("k3+", "low_var_kl+", "k1+"):
        assert ours({f"{A}.use_kl_loss": True, f"{A}.kl_loss_type": kind})["algo.kl.estimator"] == "k2"
    assert ours({"algorithm.use_kl_in_reward": True, "algorithm.kl_penalty": "k3+"})["algo.kl.estimator"] == "k3"


def test_tools_of_a_configuration_that_is_not_read_are_on() -> None:
    key = f"{R}.multi_turn.interaction_config_path"
    assert lost({key: "i.yaml", "config-name": "my_own"}) == {"config-name": True, key: True}
    assert lost({key: "i.yaml"}) == {}


@pytest.mark.parametrize("settings", [{}, {f"{A}.loss_agg_mode": "token-mean"}])
def test_each_import_says_that_verls_old_workers_average_micro_batches(settings: dict[str, Any]) -> None:
    conversion = imported(settings)
    (outcome,) = [outcome for outcome in conversion.outcomes if outcome.ours == "algo.loss_mode"]
    assert "token-mean-microbatch" in outcome.note and conversion.is_given(outcome)


def test_an_estimator_that_is_not_known_is_one_question() -> None:
    unknown = ForeignSetting("algorithm.adv_estimator", "${1}", "run.sh line 1", ("argument 1",))
    asked = convert(ForeignRun("verl", Path("run.sh"), "verl.trainer.main_ppo", "", (unknown,)), VERL).asked
    assert [key for key in asked if key.startswith(("algo.", "critic."))] == ["algo.advantage"]
