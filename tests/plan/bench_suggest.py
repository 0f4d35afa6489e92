"""CPU time of `dapo-mcore plan --suggest` for the models and clusters below. Goal: a second for 16 nodes of 8 GPUs.

pytest -s -m bench tests/plan/bench_suggest.py
"""

from __future__ import annotations

import time
from typing import Any

import pytest

from dapo_mcore.plan.plan import make_plan
from dapo_mcore.plan.suggest import suggest
from tests.plan.jobs import job

SEVEN: dict[str, Any] = {"parallel__tensor_parallel": 4, "parallel__pipeline_parallel": 1}
AHEAD: dict[str, Any] = {
    "rollout__sglang__colocated": False,
    "rollout__sglang__sync": "distributed",
    "rollout__async_steps": 1,
    "algo__tis": {"mode": "truncate"},
    "reward__workers": 8,
}
EXPERTS: dict[str, Any] = {"parallel": {"pipeline_parallel": 8, "expert_parallel": 8}}
JOBS: dict[str, dict[str, Any]] = {
    "7B on 1 × 8": dict(of="Qwen2.5-7B", nodes=1, rollout__sglang__num_servers=2, **SEVEN),
    "32B on 16 × 8": {},
    "32B on 16 × 8, servers beside": dict(rollout__sglang__num_servers=8, **AHEAD),
    "235B-A22B on 32 × 8": dict(of="Qwen3-235B-A22B", nodes=32, rollout__sglang__tensor_parallel=8, **EXPERTS),
}


@pytest.mark.bench
@pytest.mark.parametrize("gpu", ["h100", "h200"])
@pytest.mark.parametrize("name", JOBS)
def test_suggestions(name: str, gpu: str) -> None:
    plan = make_plan(job(gpu=gpu, **JOBS[name]))
    start = time.process_time()
    found = suggest(plan)
    print(f"\n{name} {gpu}: {time.process_time() - start:.2f} s, {len(found)} suggestions")
