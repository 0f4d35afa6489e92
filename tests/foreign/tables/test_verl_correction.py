"""verl's corrections of the engine's mismatch in our words."""

from __future__ import annotations

from typing import Any

import pytest

from tests.foreign.verl_runs import A, R, imported, lost, ours

CORRECTION = "algorithm.rollout_correction"


def test_importance_weights() -> None:
    token = {f"{CORRECTION}.rollout_is": "token", f"{CORRECTION}.rollout_is_threshold": 3.0}
    assert ours(token)["algo.tis"] == {"mode": "truncate", "cap": 3.0}
    sequence = {f"{CORRECTION}.rollout_is": "sequence", f"{CORRECTION}.rollout_is_batch_normalize": True}
    assert ours(sequence)["algo.tis"] == {"mode": "truncate", "level": "sequence", "cap": 2.0, "normalize": True}
    assert ours({f"{A}.tis_imp_ratio_cap": 2.0})["algo.tis"] == {"mode": "truncate", "cap": 2.0}
    assert "algo.tis" not in ours({f"{A}.tis_imp_ratio_cap": -1})
    assert lost({f"{CORRECTION}.rollout_is": "group"}) == {f"{CORRECTION}.rollout_is": True}


def test_bypass_mode_takes_the_engines_log_probs() -> None:
    assert ours({f"{CORRECTION}.bypass_mode": True})["algo.old_logprobs"] == "rollout"
    other = {f"{CORRECTION}.bypass_mode": True, f"{CORRECTION}.loss_type": "sft"}
    assert lost(other) == {f"{CORRECTION}.loss_type": True}


REINFORCE = {f"{CORRECTION}.bypass_mode": True, f"{CORRECTION}.loss_type": "reinforce", f"{A}.clip_ratio_high": 0.28}
PLAIN = {"algo.policy_loss": "cispo", "algo.clip_low": 0.0, "algo.clip_high": 0.0, "algo.old_logprobs": "rollout"}
TOKEN = {f"{CORRECTION}.rollout_is": "token", f"{CORRECTION}.rollout_is_threshold": 5.0}
SEQUENCE = {f"{CORRECTION}.rollout_is": "sequence", f"{A}.ppo_mini_batch_size": 1024}
OF_RESPONSES = {"mode": "truncate", "level": "sequence", "cap": 2.0}


@pytest.mark.parametrize(
    ("weights", "keys"),
    [
        ({}, PLAIN),
        (TOKEN, {**PLAIN, "algo.clip_low": 1.0, "algo.clip_high": 4.0}),
        (SEQUENCE, {**PLAIN, "algo.old_logprobs": "actor", "algo.tis": OF_RESPONSES}),
    ],
)
def test_reinforce_in_bypass_mode_is_cispo_whose_bounds_leave_the_weight(
    weights: dict[str, Any], keys: dict[str, Any]
) -> None:
    found = ours({**REINFORCE, **weights, f"{A}.clip_ratio_c": 4.0})
    names = (*PLAIN, "algo.tis", "algo.dual_clip")
    assert {key: found[key] for key in names if key in found} == keys
    assert lost({**REINFORCE, **weights}) == {}


def test_reinforces_weights_of_responses_over_several_gradient_steps_are_not_verls() -> None:
    """They are written, as the nearest, and lost, as verl's follow the policy of each gradient step."""
    loss = {f"{CORRECTION}.rollout_is": True}
    normalised = {**REINFORCE, **SEQUENCE, f"{CORRECTION}.rollout_is_batch_normalize": True}
    assert lost({**REINFORCE, **SEQUENCE, f"{A}.ppo_mini_batch_size": 256}) == loss == lost(normalised)
    assert ours(normalised)["algo.tis"] == {**OF_RESPONSES, "normalize": True}


def test_reinforces_weights_that_no_bounds_express_are_lost() -> None:
    assert lost({**REINFORCE, **TOKEN, f"{CORRECTION}.rollout_is_threshold": 0.5}) == {
        f"{CORRECTION}.rollout_is_threshold": True
    }
    mean = f"{CORRECTION}.rollout_is_batch_normalize"
    assert lost({**REINFORCE, **TOKEN, mean: True}) == {mean: True}


@pytest.mark.parametrize(
    ("names", "bounds", "criteria"),
    [
        ("seq_sum_k1", "0.5_2.0", [{"level": "sequence", "lower": 0.5, "upper": 2.0}]),
        ("seq_mean_k1", "0.8_1.1", [{"level": "geometric", "lower": 0.909091, "upper": 1.25}]),
        ("token_k1", 4, [{"level": "token", "lower": 0.25, "upper": 4.0}]),
        ("seq_max_k2", 0.5, [{"level": "every", "measure": "k2", "upper": 0.5}]),
        (
            "token_k3, seq_mean_k1",
            "0.1,2",
            [
                {"level": "token", "measure": "k3", "upper": 0.1},
                {"level": "geometric", "lower": 0.5, "upper": 2.0},
            ],
        ),
    ],
)
def test_rejection_bounds_are_those_of_our_ratio(names: str, bounds: Any, criteria: list[dict[str, Any]]) -> None:
    settings = {f"{CORRECTION}.rollout_rs": names, f"{CORRECTION}.rollout_rs_threshold": bounds}
    assert ours(settings)["algo.rejection"] == criteria


def test_rejection_of_older_versions_with_a_veto() -> None:
    settings = {
        f"{CORRECTION}.rollout_rs": "geometric", f"{CORRECTION}.rollout_rs_threshold": 1.01,
        f"{CORRECTION}.rollout_rs_threshold_lower": 0.99, f"{CORRECTION}.rollout_token_veto_threshold": 1e-4,
    }  # fmt: skip
    assert ours(settings)["algo.rejection"] == [
        {"level": "geometric", "lower": 0.99, "upper": 1.01},
        {"level": "every", "lower": 1e-4},
    ]
    assert lost({f"{CORRECTION}.rollout_rs": "by_mood"}) == {f"{CORRECTION}.rollout_rs": True}


def test_importance_weights_beside_bypass_mode_lose_nothing() -> None:
    assert lost({f"{CORRECTION}.rollout_is": "token", f"{CORRECTION}.bypass_mode": True}) == {}


def test_the_note_says_where_verl_corrects_nothing() -> None:
    """Without calculate_log_probs verl's engine returns no log-probs, and verl leaves the correction out without a word."""
    weights = {f"{CORRECTION}.rollout_is": "token"}
    for log_probs, told in ((False, True), (True, False)):
        outcomes = imported({**weights, f"{R}.calculate_log_probs": log_probs}).outcomes
        (note,) = [outcome.note for outcome in outcomes if outcome.sources == (f"{CORRECTION}.rollout_is",)]
        assert ("corrects nothing" in note) == told


def test_bypass_mode_has_ppos_clipped_loss_whatever_is_set() -> None:
    """apply_bypass_mode of verl overwrites policy_loss.loss_mode."""
    bypass = {f"{CORRECTION}.bypass_mode": True}
    for name in ("vanilla", "gspo", "cispo", "kl_cov", "bypass_mode"):
        found = ours({**bypass, f"{A}.policy_loss.loss_mode": name, f"{A}.clip_ratio_c": 5.0})
        assert (found["algo.policy_loss"], found["algo.dual_clip"]) == ("clip", 5.0)
        assert "algo.kl_cov" not in found
        assert found["algo.loss_mode"] == "token-mean"
    assert lost({**bypass, f"{A}.policy_loss.loss_mode": "sapo"}) == {f"{A}.policy_loss.loss_mode": True}


def test_weights_without_a_threshold_are_none() -> None:
    assert "algo.tis" not in ours({f"{CORRECTION}.rollout_is": "token", f"{CORRECTION}.rollout_is_threshold": None})


def test_reinforce_under_its_older_name() -> None:
    assert lost({f"{CORRECTION}.use_policy_gradient": True}) == {f"{CORRECTION}.use_policy_gradient": True}
    assert lost({f"{CORRECTION}.use_policy_gradient": False}) == {}


def test_names_of_the_version_before_the_section_are_lost() -> None:
    assert lost({"algorithm.rollout_is": True, "algorithm.rollout_is_threshold": 2.0}) == {
        "algorithm.rollout_is": True,
        "algorithm.rollout_is_threshold": True,
    }
