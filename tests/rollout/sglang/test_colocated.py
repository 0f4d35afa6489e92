"""Fake servers that share GPUs with the trainer: when each side holds memory, and how failures change that.

The rules of the real server's memory calls are in test_server_rules.py; whole runs are tests/train/test_sglang.py and test_weights_lost.py.
"""

from __future__ import annotations

import os
import signal
import time

import pytest

from dapo_mcore.errors import RolloutError, UpdateBroken
from dapo_mcore.rollout.sglang.engine import SGLangEngine
from tests.rollout.sglang.asserts import all_serve, assert_whole
from tests.rollout.sglang.fake_server import fake_python, gated
from tests.rollout.sglang.serving import engine, order, params, prompts, servers, states, told, wait_for, weights

EVERYTHING = ["cuda_graph", "kv_cache", "weights"]


def released(made: SGLangEngine) -> list[list[str]]:
    return [told(server)["released"] for server in servers(made)]


def take_turns(made: SGLangEngine, version: int) -> None:
    """Do what handover.py does after training."""
    made.update_weights(weights(version), version)
    made.resume()


def assert_generates(made: SGLangEngine, version: int) -> None:
    asked = prompts(40)
    assert_whole(made.generate(asked, params(16)), asked, 16, version)


def is_alive(made: SGLangEngine, number: int) -> bool:
    return made.pool.servers[number].process.alive


@pytest.mark.parametrize("sync", ["disk", "distributed"])
def test_servers_take_and_release_memory_in_turns_with_the_trainer(tmp_path, sync):
    with engine(tmp_path, num_servers=2, colocated=True, sync=sync, request_timeout_s=8.0) as made:
        assert released(made) == [EVERYTHING] * 2, "the trainer comes first"
        for version in (0, 1):
            made.update_weights(weights(version), version)
            assert released(made) == [["cuda_graph", "kv_cache"]] * 2
            with pytest.raises(RolloutError, match="none of 2 rollout servers"):
                made.generate(prompts(1), params(4))
            made.resume()
            assert released(made) == [[]] * 2
            assert_generates(made, version)
            made.release()
            assert released(made) == [EVERYTHING] * 2
        numbers = made.metrics()
        assert numbers["sync/release_s"] > 0 and numbers["sync/resume_s"] > 0
        assert numbers["rollout/servers_suspected"] == numbers["rollout/servers_excluded"] == 0


def test_no_health_check_reaches_servers_that_have_released_memory(tmp_path):
    """A health check generates a token, and the real server would end."""
    with engine(tmp_path, colocated=True, health_interval_s=0.1) as made:
        take_turns(made, 0)
        made.release()
        time.sleep(1.0)
        assert told(servers(made)[0])["counts"].get("generated", 0) == 0
        take_turns(made, 1)
        assert_generates(made, 1)
        assert made.metrics()["rollout/servers_suspected"] == 0


def test_a_server_that_dies_in_the_trainers_turn_is_restarted_after_it(tmp_path):
    with engine(tmp_path, num_servers=2, colocated=True) as made:
        take_turns(made, 0)
        made.release()
        os.kill(told(servers(made)[0])["pid"], signal.SIGKILL)
        made.update_weights(weights(1), 1)
        assert not is_alive(made, 0), "the memory is the trainer's until resume"
        made.resume()
        assert_generates(made, 1)
        all_serve(made)
        assert {told(server)["weight_version"] for server in servers(made)} == {made.pool.weight_version}
        made.release()
        take_turns(made, 2)
        assert_generates(made, 2)


def test_a_server_that_does_not_release_memory_is_stopped_in_the_trainers_turn(tmp_path):
    with engine(tmp_path, num_servers=2, colocated=True) as made:
        take_turns(made, 0)
        order(servers(made)[0], "status", where="/release_memory_occupation", value=500)
        made.release()
        wait_for(lambda: not is_alive(made, 0))
        take_turns(made, 1)
        assert_generates(made, 1)
        all_serve(made)
        numbers = made.metrics()
        assert numbers["rollout/server_restarts"] == numbers["rollout/servers_excluded"] == 1


def test_a_server_that_never_releases_memory_spends_the_restart_budget(tmp_path):
    with engine(tmp_path, num_servers=2, colocated=True, restart_budget=1) as made:
        for version in range(2):
            take_turns(made, version)
            all_serve(made)
            order(servers(made)[0], "status", where="/release_memory_occupation", value=500)
            made.release()
        take_turns(made, 2)
        wait_for(lambda: states(made) == ["lost", "serving"], 10)
        assert_generates(made, 2)
        assert made.metrics()["rollout/server_restarts"] == 1


def test_a_restart_under_way_is_stopped_in_the_trainers_turn(tmp_path):
    gate = tmp_path / "closed"
    with engine(tmp_path, python=gated(fake_python(tmp_path), gate), num_servers=2, colocated=True) as made:
        take_turns(made, 0)
        gate.touch()
        order(servers(made)[0], "die")
        assert_generates(made, 0)
        wait_for(lambda: made.pool.counts["server_restarts"] == 1 and is_alive(made, 0))
        made.release()
        gate.unlink()
        time.sleep(1.0)
        assert not is_alive(made, 0) and is_alive(made, 1)
        take_turns(made, 1)
        all_serve(made)
        assert_generates(made, 1)


def test_resume_waits_for_the_first_server_if_all_died_in_the_trainers_turn(tmp_path):
    with engine(tmp_path, colocated=True) as made:
        take_turns(made, 0)
        made.release()
        os.kill(told(servers(made)[0])["pid"], signal.SIGKILL)
        take_turns(made, 1)
        assert_generates(made, 1)
        assert made.metrics()["rollout/servers_resynced"] == 1


def test_a_broadcast_that_reaches_no_server_may_be_repeated_in_another_turn(tmp_path):
    with engine(tmp_path, colocated=True, sync="distributed") as made:
        take_turns(made, 0)
        made.release()
        os.kill(told(servers(made)[0])["pid"], signal.SIGKILL)
        with pytest.raises(UpdateBroken, match=r"none of 1 rollout servers .*only without the weights: 1 "):
            take_turns(made, 1)
        made.release()
        take_turns(made, 1)
        assert_generates(made, 1)
