from __future__ import annotations

from dapo_mcore.plan.change import changed
from dapo_mcore.plan.plan import make_plan
from dapo_mcore.plan.suggest import suggest
from tests.plan.jobs import job


def test_suggestions_fit_are_ranked_and_can_be_applied() -> None:
    plan = make_plan(job())
    found = suggest(plan)
    steps = [own.plan.time.total for own in found]
    assert len(found) == 5 and steps[0] < plan.time.total
    assert max(steps) < 1.03 * min(steps)  # alike, so that the simplest is first
    mesh = found[0].plan.job.config.parallel
    assert (mesh.tensor_parallel, mesh.pipeline_parallel, mesh.context_parallel) == (8, 1, 1)
    for own in found:
        assert own.plan.fits and own.plan.memory.worst.total < 0.93 * own.plan.memory.worst.capacity
    for own in found:
        other = changed(plan.job, own.changes)
        assert other is not None and make_plan(other).time.total == own.plan.time.total
        assert own.in_fp8 is None or own.in_fp8.time.total < own.plan.time.total
    assert found[0].in_fp8 is not None
    # full recomputation wastes time where memory is free
    assert found[0].plan.job.config.model.recompute != "full" and "recompute -" in found[0].reason


def test_a_layout_that_is_the_best_is_suggested_unchanged() -> None:
    best = suggest(make_plan(job()))[0]
    again = suggest(best.plan)[0]
    assert again.plan.time.total == best.plan.time.total


def test_servers_of_their_own_get_a_better_share() -> None:
    beside = {"rollout__sglang__colocated": False, "rollout__sglang__sync": "distributed", "rollout__async_steps": 1}
    ahead = {"algo__tis": {"mode": "truncate"}, "reward__workers": 8, "rollout__sglang__num_servers": 8}
    plan = make_plan(job(**beside, **ahead))
    best = suggest(plan)[0]
    assert best.plan.job.num_servers > plan.job.num_servers == 32
    assert best.plan.time.total < plan.time.total and best.plan.job.config.rollout.async_steps == 1


def test_a_full_gpu_is_suggested_only_if_nothing_else_fits() -> None:
    mesh = {"parallel__tensor_parallel": 4, "parallel__pipeline_parallel": 1, "rollout__sglang__num_servers": 2}
    for gib, fullest in ((22, 1.0), (26, 0.92)):
        found = suggest(make_plan(job("Qwen2.5-7B", nodes=1, assumed={"memory_gib": gib}, **mesh)))
        used = [own.plan.memory.worst.total / own.plan.memory.worst.capacity for own in found]
        assert used and max(used) <= fullest
    assert min(used) < 0.9


def test_experts_are_distributed() -> None:
    plan = make_plan(
        job("Qwen3-30B-A3B", nodes=2, parallel={}, rollout__sglang__num_servers=2, rollout__sglang__tensor_parallel=8)
    )
    assert not plan.fits
    found = suggest(plan, 8)
    assert all(own.plan.fits for own in found)
    assert found[0].plan.job.config.parallel.expert_parallel == 8 and found[0].plan.job.tensor == 1


def test_no_layout_is_invented_where_none_fits() -> None:
    assert (
        suggest(
            make_plan(
                job(nodes=1, parallel__tensor_parallel=4, rollout__sglang__num_servers=1, assumed={"memory_gib": 20})
            )
        )
        == []
    )
