"""NeMo-RL's defaults."""

from __future__ import annotations

from tests.foreign.nemo_runs import ours


def test_defaults_that_name_another_key_have_its_value() -> None:
    place = "grpo.reward_shaping"
    found = ours({"policy.max_total_sequence_length": 700, f"{place}.enabled": True})
    assert found["reward.overlong.max_length"] == 700


def test_defaults_that_differ_from_ours_are_written() -> None:
    found = ours({})
    assert (found["optimizer.lr"], found["algo.kl.coef"], found["sampling.style"], found["seed"]) == (
        5e-6,
        0.01,
        "none",
        42,
    )
