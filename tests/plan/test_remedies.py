from __future__ import annotations

import pytest

from dapo_mcore.plan.change import changed
from dapo_mcore.plan.held import GIB
from dapo_mcore.plan.plan import make_plan
from dapo_mcore.plan.remedies import problems
from tests.plan.jobs import job


def test_nothing_is_told_of_a_run_that_fits() -> None:
    assert problems(make_plan(job())) == []


def test_activations_are_named_with_the_settings_that_help_and_by_how_much() -> None:
    plan = make_plan(job(model__recompute="none", parallel__tensor_parallel=4, parallel__pipeline_parallel=4))
    (found,) = problems(plan)
    worst = plan.memory.worst
    assert (found.where, found.culprit) == ("training, stage 0 of 4", "activations")
    assert found.missing == worst.total - worst.capacity > 0
    for remedy in found.remedies:
        other = changed(plan.job, remedy.changes)
        assert other is not None
        now = make_plan(other).memory.worst
        assert remedy.saved == pytest.approx(worst.total - now.total) and remedy.fits == now.fits
    tried = [remedy.changes for remedy in found.remedies if remedy.fits]
    assert {"model.recompute": "full"} in tried


def test_the_embedded_engine_of_a_large_model_is_replaced_by_servers() -> None:
    found = problems(make_plan(job(rollout={"engine": "embedded"})))
    assert [problem.where.split(",")[0] for problem in found] == ["training", "sync", "generate"]
    assert found[0].culprit == "embedded engine"
    first = found[0].remedies[0]
    assert first.fits and first.changes["rollout.engine"] == "sglang" and first.saved > 60 * GIB
    assert found[2].culprit.startswith("embedded engine; the KV cache holds 5,600 of the 22,528 tokens")


def test_a_server_without_room_for_its_cache() -> None:
    servers = {"num_servers": 128, "tensor_parallel": 1, "server_args": {"mem-fraction-static": 0.8}}
    (found,) = problems(make_plan(job(**{f"rollout__sglang__{key}": value for key, value in servers.items()})))
    assert found.where.startswith("generate")
    assert (
        found.culprit == "servers' weights; the KV cache holds 9,554 of the 22,528 tokens of one longest sequence "
        "(data.max_prompt_tokens + rollout.max_response_tokens)"
    )
    weights, cache = 2 * 32_763_876_352, 22528 * 64 * 2 * 2 * 8 * 128
    assert found.missing == pytest.approx(weights + cache - 0.8 * 79.2 * GIB)
    best = found.remedies[0]
    assert best.fits and best.saved == found.missing
    assert {"rollout.sglang.tensor_parallel": 2, "rollout.sglang.num_servers": 64} in [
        own.changes for own in found.remedies
    ]


def test_the_host_is_planned_too() -> None:
    (found,) = problems(make_plan(job(assumed={"host_gib": 260})))
    assert found.where == "host of the first node" and found.culprit == "/dev/shm"
    small = problems(make_plan(job(assumed={"host_gib": 200})))
    assert [problem.where for problem in small] == ["host of the first node", "/dev/shm of the first node"]
    away = job(model__offload_activations=True, assumed={"host_gib": 190}, rollout__sglang__sync_dir="/shared")
    (found,) = problems(make_plan(away))
    assert {"model.offload_activations": False} in [own.changes for own in found.remedies if own.fits]
