"""Quantities that follow from several sections."""

from __future__ import annotations

from pathlib import Path

import pytest

from dapo_mcore.config.file import load_config


@pytest.mark.parametrize(
    ("overrides", "unscored"),
    [
        ([], 1),
        (["batch.epochs=2"], 1),  # further epochs take the old log-probs of the first gradient step
        (["algo.kl={coef: 0.1, place: reward}"], 0),
        (["batch.epochs=2", "model.routing_replay=scoring"], 0),
        (["algo.old_logprobs=rollout"], 16),
        (["algo.old_logprobs=rollout", "algo.max_mismatch=0.1"], 1),
        (["algo.old_logprobs=rollout", "algo.rejection=[{level: token, upper: 2}]"], 0),
    ],
)
def test_the_first_gradient_step_needs_no_scoring_pass_unless_something_else_reads_it(
    file: Path, overrides: list[str], unscored: int
) -> None:
    assert load_config(file, overrides).num_unscored(16) == unscored
