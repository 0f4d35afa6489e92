"""Reward workers on a local Ray cluster: the pool's rules hold there too, and a lost actor loses no attempt."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from dapo_mcore.config.reward import RewardConfig
from dapo_mcore.errors import ConfigError, RewardError
from dapo_mcore.reward import ray_pool
from dapo_mcore.reward.attempt import Attempt
from dapo_mcore.reward.plugins import Rule
from dapo_mcore.reward.pool import RewardPool
from dapo_mcore.reward.ray_pool import RayRewardPool
from dapo_mcore.reward.scorer import build_reward
from dapo_mcore.types import Prompt, Rollout, ToolCall
from tests.reward.waiting import wait_for

ZOO = Path(__file__).with_name("plugin_zoo.py")

# not imported here: Ray reads RAY_AUTH_MODE once, while it is imported, and the pool sets it
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="pip install 'dapo_mcore[ray]'")


def pool(num_workers: int = 2, timeout_seconds: float = 60.0, function: str = "by_text") -> RayRewardPool:
    return RayRewardPool(num_workers, Rule(f"{ZOO}:{function}"), timeout_seconds, None)


def attempts(*responses: str) -> list[Attempt]:
    return [Attempt("q", response, "a") for response in responses]


def kill(actor: Any) -> None:
    """Kill an actor and wait until it is dead."""
    import ray

    ray.kill(actor)
    with pytest.raises(ray.exceptions.ActorDiedError):
        for _ in range(3000):
            ray.get(actor.score.remote([]))
            time.sleep(0.02)


@pytest.fixture(scope="module")
def workers() -> Iterator[RayRewardPool]:
    """The pool that starts this module's cluster and ends it."""
    made = pool()
    yield made
    made.close()
    made.close()


@needs_ray
def test_outcomes_come_back_in_order_from_every_worker(workers):
    assert workers.score([]) == []
    scores = [float(n) for n in range(40)]
    assert [outcome.score for outcome in workers.score(attempts(*(f"score {n}" for n in scores)))] == scores
    slow = workers.score(attempts(*["sleep 0.2", "pid"] * 8))
    assert len({outcome.pred for outcome in slow[1::2]}) == 2


@needs_ray
def test_an_attempt_that_hangs_or_kills_its_process_loses_only_itself(workers):
    hasty = pool(timeout_seconds=3.0)
    outcomes = hasty.score(attempts("score 1", "spin", "exit 7", "raise no", *["score 2"] * 6))
    hasty.close()
    failures = [outcome.failure for outcome in outcomes]
    assert failures[:2] == [None, "timeout"] and failures[2].startswith("exit: the reward process ended with code 7")
    assert failures[3] == "exception: ValueError: no" and failures[4:] == [None] * 6


@needs_ray
def test_rewards_are_not_starved_by_a_trainer_beside_them(workers):
    assert workers.score(attempts("niceness"))[0].pred == str(os.nice(0))


@needs_ray
def test_the_work_of_a_lost_actor_is_done_by_the_others_and_it_is_replaced(workers, tmp_path):
    lost, begun = workers.actors[0], tmp_path / "begun"
    killer = threading.Thread(target=lambda: (wait_for(begun.exists), kill(lost)))
    killer.start()
    outcomes = workers.score(attempts(f"hang-once {begun}", *["score 1"] * 29))
    killer.join()
    assert [outcome.score for outcome in outcomes] == [1.0] * 30
    assert workers.actors[0] is not lost
    assert [outcome.score for outcome in workers.score(attempts(*["score 3"] * 30))] == [3.0] * 30


@needs_ray
def test_attempts_that_lose_every_node_fail(workers, monkeypatch):
    monkeypatch.setattr(ray_pool, "MOST_LOSSES", 1)
    frail = pool()
    kill(frail.actors[0])
    outcomes = frail.score(attempts(*["score 2"] * 16))
    frail.close()
    assert [outcome.failure for outcome in outcomes] == ["exit: lost with 1 nodes"] * 2 + [None] * 14


@needs_ray
def test_a_worker_that_no_node_can_start_is_the_error_of_the_run(workers, monkeypatch):
    class Doomed(ray_pool.RewardHost):
        def __init__(self, *_):
            raise ImportError("no dapo_mcore on this node")

    monkeypatch.setattr(ray_pool, "RewardHost", Doomed)
    with pytest.raises(RewardError, match=r"worker 0 was lost 3 times while it started: (?s:.*)no dapo_mcore"):
        pool(num_workers=1)


@needs_ray
def test_a_function_that_cannot_be_loaded_on_a_node_is_the_error_of_the_run(workers):
    with pytest.raises(RewardError, match="nowhere"):
        RayRewardPool(1, Rule(f"{ZOO}:nowhere"), 10.0, None)
    assert workers.score(attempts("score 5"))[0].score == 5.0, "a pool that did not connect must not disconnect"


@needs_ray
def test_more_workers_than_the_cluster_has_cpus_are_refused(workers):
    with pytest.raises(ConfigError, match=r"reward\.workers 5000 need as many CPUs, but the Ray cluster has 1024"):
        pool(num_workers=5000)


@needs_ray
def test_the_configuration_chooses_the_cluster(workers):
    config = RewardConfig(function=f"{ZOO}:of_transcript", workers=1, placement="ray")
    reward = build_reward(config, max_response_tokens=8)
    prompt = Prompt("t:0", np.zeros(1, np.int32), "q", "7")
    call = ToolCall("python", "3 + 4", "ok", "7", 0.1)
    rollout = Rollout(
        np.zeros(1, np.int32), np.zeros(1, np.float32), np.ones(1, bool), "stop", 0, num_turns=2, calls=(call,)
    )
    (scored,) = reward([prompt], [rollout], [["Let me see.", "Answer: 7"]])
    pid, text = scored.pred.split(" ", 1)
    assert text == "2 turns: Let me see.|Answer: 7; python(3 + 4): ok: 7"
    assert psutil.Process(int(pid)).ppid() != os.getpid(), "workers of this machine are children of this process"
    reward.close()


def test_reward_processes_do_not_get_the_clusters_token(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    plugin = tmp_path / "plugin.py"
    plugin.write_text(
        "import os\n\ndef tell(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return {'score': 1.0, 'pred': ' '.join(name for name in os.environ if name.startswith('RAY_'))}\n"
    )
    local = RewardPool(1, Rule(f"{plugin}:tell"), 10.0)
    assert local.score(attempts("a"))[0].pred == "" and os.environ["RAY_AUTH_TOKEN"] == "secret"
    local.close()
