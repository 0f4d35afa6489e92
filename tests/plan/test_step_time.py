from __future__ import annotations

from typing import Any

import pytest

from dapo_mcore.plan.plan import make_plan
from tests.plan.jobs import job

BESIDE: dict[str, Any] = {"nodes": 32, "rollout__sglang__colocated": False, "rollout__sglang__sync": "distributed"}


def test_parts_wait_for_each_other_unless_generation_runs_ahead() -> None:
    time = make_plan(job(**BESIDE)).time
    training = time.train.score_s + time.train.update_s + time.train.critic_s
    assert time.total == time.rollout.total + training + time.sync and time.handover == 0
    ahead = {"rollout__async_steps": 1, "algo__tis": {"mode": "truncate"}, "reward__workers": 8}
    beside = make_plan(job(**BESIDE, **ahead)).time
    assert beside.total == pytest.approx(max(time.rollout.total, training) + time.sync)
    assert beside.work == pytest.approx(time.work) and time.work == pytest.approx(time.total)


def test_a_sync_collects_the_model_from_other_nodes_and_sends_it_once_per_group_of_servers() -> None:
    gigabytes = 2 * 32.763876352
    collected = gigabytes * (1 - 8 / 16) / (0.7 * 50)
    alone = {**BESIDE, "rollout__sglang__senders": 1}
    assert make_plan(job(**alone)).time.sync == pytest.approx(collected + gigabytes / 20)
    groups = make_plan(job(**alone, rollout__sglang__servers_per_group=8)).time.sync
    assert groups == pytest.approx(collected + 4 * gigabytes / 20)
    assert make_plan(job(**BESIDE)).time.sync == pytest.approx(gigabytes / 20), "each stage's tensors stay on its node"
    assert make_plan(job()).time.sync == pytest.approx(collected + gigabytes / 1.1)  # by disk
    nodes = {"rollout__sglang__placement": "nodes", "rollout__sglang__host": "node", "rollout__sglang__sync": "tensor"}
    relayed = gigabytes / (0.7 * 50)  # once to each node
    assert make_plan(job(**nodes)).time.sync == pytest.approx(collected + relayed + gigabytes / 14.8)


def test_a_sync_of_changes_compares_with_the_hosts_weights_and_sends_few_bytes() -> None:
    gigabytes = 2 * 32.763876352
    collected, compared = gigabytes * (1 - 8 / 16) / (0.7 * 50), gigabytes / (0.8 * 64)
    changes = make_plan(job(**BESIDE, rollout__sglang__delta=True)).time.sync
    assert changes == pytest.approx(collected + compared + 0.07 * gigabytes / 20)


def test_colocated_actors_go_to_the_host_and_back() -> None:
    plan = make_plan(job())
    parts = plan.memory.train[0].parts
    assert plan.time.handover == pytest.approx(2 * (parts["parameters"] + parts["optimizer"]) / (0.8 * 64e9))
