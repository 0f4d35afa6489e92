"""The section reward: defaults and rules."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from dapo_mcore.config.reward import RewardConfig


def test_a_reward_function_that_may_hang_gets_a_worker_by_default() -> None:
    workers = {"math_dapo": 0, "math_verify": 1, "my.module:f": 1}
    assert {name: RewardConfig(function=name).num_workers for name in workers} == workers
    assert RewardConfig(function="my.module:f", workers=0).num_workers == 0


def test_math_verify_never_runs_without_a_deadline():
    assert RewardConfig(function="math_verify").num_workers == 1
    with pytest.raises(ValidationError, match="math_verify needs workers of at least 1"):
        RewardConfig(function="math_verify", workers=0)
    with pytest.raises(ValidationError, match="strict_box is a form of function math_dapo"):
        RewardConfig(function="math_verify", strict_box=True)


def test_a_cluster_of_reward_workers_needs_workers():
    with pytest.raises(ValidationError, match="placement ray needs workers of at least 1"):
        RewardConfig(placement="ray")
