"""The section reward: defaults and rules."""

from __future__ import annotations

from datetime import date

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


def test_rules_of_sources_that_cannot_hang_need_no_worker() -> None:
    assert RewardConfig(function="by_source").num_workers == 0
    assert RewardConfig(function="by_source", by_source={"mine": "gsm8k"}).num_workers == 0
    assert RewardConfig(function="by_source", by_source={"mine": "math_verify"}).num_workers == 1
    assert RewardConfig(function="by_source", by_source={"mine": "my.module:f"}).num_workers == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"function": "by_source", "by_source": {"a": "by_source"}}, "names itself as the rule of a source"),
        ({"function": "by_source", "by_source": {"a": "math_verify"}, "workers": 0}, "needs workers of at least 1"),
        (
            {"function": "deepscaler"},
            "function 'deepscaler' is neither math_dapo, .* nor an import path; write package.module:f",
        ),
        ({"function": "by_source", "by_source": {"a": "dapo"}}, "function 'dapo' is neither"),
        ({"kwargs": {"weight": 1}}, "kwargs are for imported functions, and math_dapo calls none; leave out weight"),
        ({"function": "a:f", "kwargs": {"day": date(2026, 1, 1)}}, "kwargs go to other processes as JSON"),
    ],
)
def test_tables_and_arguments_that_cannot_work_are_refused(settings, message) -> None:
    with pytest.raises(ValidationError, match=message):
        RewardConfig(**settings)


def test_another_function_leaves_out_what_belongs_to_the_first_one() -> None:
    config = RewardConfig(strict_box=True, timeout_seconds=5)
    assert config.for_function("math_dapo") is config
    assert config.for_function("gsm8k") == RewardConfig(function="gsm8k", timeout_seconds=5)
