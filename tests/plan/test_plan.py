from __future__ import annotations

import pytest

from dapo_mcore.plan.plan import make_plan
from tests.plan.jobs import job


def test_hours_and_rates_follow_from_a_step() -> None:
    plan = make_plan(job(num_rollout_steps=320))
    assert plan.fits
    assert plan.run_hours == pytest.approx(320 * plan.time.total / 3600)
    assert plan.gpu_hours == pytest.approx(128 * plan.run_hours)
    tokens = 8192 * plan.batch.mean_sample
    assert plan.tokens_per_s_per_gpu == pytest.approx(tokens / plan.time.total / 128)


def test_a_faster_card_takes_less_time() -> None:
    steps = [make_plan(job(gpu=gpu)).time.total for gpu in ("h100", "h200", "b200")]
    assert steps == sorted(steps, reverse=True)
