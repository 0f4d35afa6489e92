"""Broadcasts to groups of fake servers: one pass of the weights per group, and what a server that dies meanwhile costs."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from dapo_mcore.errors import ConfigError, RolloutError, UpdateBroken
from dapo_mcore.observe.progress import Progress
from dapo_mcore.rollout.sglang.client.http import RequestFailed
from dapo_mcore.rollout.sglang.engine import SGLangEngine
from dapo_mcore.rollout.sglang.sync.distributed import BroadcastGroup, check_sync_host
from dapo_mcore.rollout.sglang.sync.process_group import RootRank
from tests.rollout.sglang.asserts import assert_whole
from tests.rollout.sglang.fake_server import fake_python, gated
from tests.rollout.sglang.leading import second_leader
from tests.rollout.sglang.serving import (
    Raw,
    bucket_a_tensor,
    engine,
    generate_and_sync_again,
    given_by,
    is_up,
    order,
    params,
    processes,
    prompts,
    servers,
    states,
    told,
    wait_for,
    weights,
)

NUM_TENSORS = len(list(weights(0)))


@pytest.fixture
def broadcasts(monkeypatch) -> list[str]:
    """Return a list that gets the group's name at every broadcast of this process."""
    begun: list[str] = []
    real = RootRank.broadcast

    def counted(self: RootRank, bucket: Any) -> None:
        begun.append(self.name)
        real(self, bucket)

    monkeypatch.setattr(RootRank, "broadcast", counted)
    return begun


@contextmanager
def led_engine(folder: Any, leaders: int, **changes: Any) -> Iterator[SGLangEngine]:
    """An engine that sends the weights itself, or with a second leader."""
    with engine(folder, sync="distributed", **changes) as made:
        if leaders == 1:
            yield made
            return
        with second_leader(made, timeout_s=changes.get("sync_timeout_s", 30.0)):
            yield made


def assert_holds(server: Raw, seed: int, tag: str) -> None:
    now = told(server)
    assert now["weight_version"] == tag and not now["session"]
    assert now["weights"] == pytest.approx({n: float(t.sum()) for n, t in weights(seed)}, rel=1e-4, abs=1e-4)


def sync(made: SGLangEngine, seed: int, version: int) -> int:
    """Update the weights, as actor/weight_stream.py does, and return how many tries were broken off before."""
    for broken in range(3):
        left = weights(seed)
        try:
            made.update_weights(left, version)
            return broken
        except UpdateBroken:
            assert made.weight_version < version and deque(left) == deque()
    raise AssertionError("broken three times")


def sent_bytes() -> int:
    """Return the bytes that this process has written, including gloo's sockets."""
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("wchar"))


@pytest.mark.parametrize("per_group, num_groups, passes", [(None, 1, 2), (1, 3, 3)])
def test_each_group_of_servers_costs_one_broadcast_per_bucket(tmp_path, broadcasts, per_group, num_groups, passes):
    """gloo sends to three others in two rounds of a binomial tree, so the bytes leave twice. NCCL's ring would send them once."""
    with engine(tmp_path, num_servers=3, sync="distributed", servers_per_group=per_group) as made:
        bucket_a_tensor(made)
        for version in (1, 2):
            before = sent_bytes()
            made.update_weights(weights(version), version)
            sent = sent_bytes() - before
            for server in servers(made):
                assert_holds(server, seed=version, tag=made.pool.weight_version)
        assert len(broadcasts) == 2 * num_groups * NUM_TENSORS
        assert len(set(broadcasts)) == num_groups, "an update without faults makes no new groups"
        assert [len(told(server)["groups"]) for server in servers(made)] == [1, 1, 1]
        numbers = made.metrics()
        assert sent / numbers["sync/bytes"] == pytest.approx(passes, rel=0.15) and numbers["sync/repeats"] == 0


@pytest.mark.parametrize("leaders", [1, 2])
@pytest.mark.parametrize("fault", ["bucket 5", "/init_weights_update_group"])
def test_a_server_that_dies_breaks_the_group_and_the_repeat_reaches_the_survivors(tmp_path, fault, broadcasts, leaders):
    """With two leaders bucket 5 is the second one's."""
    python, gate = gated(fake_python(tmp_path), tmp_path / "closed"), tmp_path / "closed"
    with led_engine(tmp_path, leaders, python=python, num_servers=3, restart_budget=1) as made:
        bucket_a_tensor(made)
        if "init" not in fault:
            made.update_weights(weights(0), version=1)
        gate.touch()
        order(servers(made)[1], "die", where=fault)
        assert sync(made, seed=1, version=2) == 1
        assert states(made)[::2] == ["serving", "serving"] and states(made)[1] != "serving"
        for server in servers(made)[::2]:
            assert_holds(server, seed=1, tag=made.pool.weight_version)
            assert len(told(server)["groups"]) == leaders, "the broken group has left the server"
        asked = prompts(30)
        assert_whole(made.generate(asked, params(16)), asked, 16, version=2)
        numbers = made.metrics()
        assert numbers["sync/repeats"] == 1 and numbers["rollout/servers_serving"] == 2
        gate.unlink()
        wait_for(lambda: states(made)[1] == "waiting")
        broadcasts.clear()
        assert sync(made, seed=3, version=3) == 0
        assert states(made) == ["serving"] * 3 and len(set(broadcasts)) == leaders
        for server in servers(made):
            assert_holds(server, seed=3, tag=made.pool.weight_version)
            assert len(told(server)["groups"]) == leaders
        assert made.metrics()["sync/repeats"] == 0


def test_a_server_that_refuses_a_bucket_breaks_the_update_for_its_group_alone(tmp_path):
    with led_engine(tmp_path, 2, num_servers=4, servers_per_group=2) as made:
        made.update_weights(weights(0), version=1)
        order(servers(made)[0], "status", where="/update_weights_from_distributed", value=400)
        assert sync(made, seed=1, version=2) == 0
        assert states(made)[2:] == ["serving", "serving"]
        wait_for(lambda: states(made)[:2] == ["waiting", "waiting"])
        assert sync(made, seed=2, version=3) == 0 and states(made) == ["serving"] * 4
        for server in servers(made):
            assert_holds(server, seed=2, tag=made.pool.weight_version)
            assert len(told(server)["groups"]) == 2, "one from each leader"


def test_servers_of_their_own_groups_that_all_fail_and_are_well_take_the_repeat(tmp_path):
    with engine(tmp_path, num_servers=2, sync="distributed", servers_per_group=1) as made:
        made.update_weights(weights(0), version=1)
        for server in servers(made):
            order(server, "status", where="/update_weights_from_distributed", value=500)
        assert sync(made, seed=1, version=2) == 1
        assert states(made) == ["serving", "serving"]
        assert made.metrics()["sync/repeats"] == 1


@pytest.mark.parametrize("leaders", [1, 2])
def test_a_server_that_refuses_every_broadcast_does_not_keep_the_others_from_the_weights(tmp_path, leaders):
    """The last repeat is made to each server alone; the one that refused three times is started again."""
    python, gate = gated(fake_python(tmp_path), tmp_path / "closed"), tmp_path / "closed"
    with led_engine(tmp_path, leaders, python=python, num_servers=3) as made:
        gate.touch()
        order(servers(made)[0], "status", where="/update_weights_from_distributed", value=400, count=100)
        assert sync(made, seed=1, version=1) == 2
        assert states(made)[1:] == ["serving"] * 2 and states(made)[0] != "serving"
        for server in servers(made)[1:]:
            assert_holds(server, seed=1, tag=made.pool.weight_version)
        asked = prompts(10)
        assert_whole(made.generate(asked, params(16)), asked, 16, version=1)
        gate.unlink()
        wait_for(lambda: states(made)[0] == "waiting")
        assert sync(made, seed=3, version=2) == 0
        assert states(made) == ["serving"] * 3
        assert [len(told(server)["groups"]) for server in servers(made)] == [leaders] * 3


def test_a_server_found_dead_before_the_update_leaves_the_group_to_the_others(tmp_path, broadcasts):
    with engine(tmp_path, num_servers=3, sync="distributed", health_interval_s=60.0) as made:
        made.update_weights(weights(0), version=1)
        os.kill(told(servers(made)[2])["pid"], signal.SIGKILL)
        assert sync(made, seed=1, version=2) == 0
        assert states(made)[:2] == ["serving", "serving"] and len(set(broadcasts)) == 2
        assert [len(told(server)["groups"]) for server in servers(made)[:2]] == [1, 1]


@pytest.mark.parametrize("noticed, interval_s", [("by its health", 0.2), ("by an answer", 60.0)])
def test_a_given_server_that_its_owner_has_restarted_joins_the_next_broadcast(tmp_path, noticed, interval_s):
    more = dict(sync="distributed", health_interval_s=interval_s)
    with engine(tmp_path, num_servers=2) as owner:
        restarted = processes(owner)[0]
        with engine(tmp_path / "other", **given_by(owner, tmp_path), **more) as made:
            made.update_weights(weights(0), version=1)
            restarted.restart()
            if noticed == "by an answer":
                wait_for(lambda: is_up(Raw(restarted.url)))
                made.generate(prompts(2), params(8))
            wait_for(lambda: states(made) == ["waiting", "serving"])
            assert sync(made, seed=1, version=2) == 0, "it does not break the group that it is no longer in"
            assert states(made) == ["serving", "serving"]
            assert_holds(servers(made)[0], seed=1, tag=made.pool.weight_version)


def test_a_server_that_hangs_in_a_broadcast_is_given_up_after_the_time_limit(tmp_path):
    """The broadcast is the second leader's."""
    with led_engine(tmp_path, 2, num_servers=2, sync_timeout_s=10.0, health_timeout_s=1.0) as made:
        bucket_a_tensor(made)
        made.update_weights(weights(0), version=1)
        order(servers(made)[0], "hang", where="/update_weights_from_distributed", after=4)
        assert sync(made, seed=1, version=2) == 1
        assert "serving" in states(made)
        asked = prompts(10)
        assert_whole(made.generate(asked, params(8)), asked, 8, version=2)


def test_servers_on_other_machines_need_the_trainers_address(tmp_path):
    here, far = ["http://127.0.0.1:30000", "http://localhost:30001"], "http://192.0.2.7:30000"
    told = rf"sync_host localhost, .* 1 of 3 servers are on others: {far}; set sync_host to the trainer's address"
    check_sync_host("localhost", here)
    check_sync_host("10.0.0.3", [far])
    with pytest.raises(ConfigError, match=told):
        check_sync_host("localhost", [*here, far])
    given = dict(python=sys.executable, sync="distributed", urls=[far], connect_timeout_s=120.0)
    with pytest.raises(ConfigError, match=r"sync_host 127\.0\.0\.1"), engine(tmp_path, **given):
        pass


def test_closing_waits_until_the_groups_have_ended(tmp_path, monkeypatch):
    """A process that exits earlier ends by SIGABRT."""
    ended: list[str] = []
    real = RootRank.close

    def slow(self: RootRank) -> None:
        time.sleep(0.5)
        real(self)
        ended.append(self.name)

    monkeypatch.setattr(RootRank, "close", slow)
    with engine(tmp_path, num_servers=2, sync="distributed", servers_per_group=1) as made:
        made.update_weights(weights(0), version=1)
        made.close()
        assert len(ended) == 2
    assert len(ended) == 2, "closing twice does nothing"


def test_the_error_says_that_the_only_server_came_back_without_weights(tmp_path):
    with engine(tmp_path, sync="distributed", request_timeout_s=2.0) as made:
        made.update_weights(weights(0), version=1)
        order(servers(made)[0], "die", where="/generate")
        expected = r"only without the weights: 1 \(another update brings them\), and none came within 2 s"
        with pytest.raises(RolloutError, match=expected):
            made.generate(prompts(3), params(16))
        assert made.weights_lost
        made.update_weights(weights(1), version=2)
        asked = prompts(3)
        assert_whole(made.generate(asked, params(16)), asked, 16, version=2)


def test_requests_wait_until_servers_that_lost_their_weights_get_them_again(tmp_path, capsys):
    with engine(tmp_path, sync="distributed", progress=Progress("run", 1)) as made:
        made.update_weights(weights(0), version=1)
        synced: list[bool] = []

        def sync_again() -> None:
            synced.append(made.weights_lost)
            made.update_weights(weights(0), version=1)

        order(servers(made)[0], "die", where="/generate", after=2)
        asked = prompts(3)
        assert_whole(generate_and_sync_again(made, asked, params(16), sync_again), asked, 16, version=1)
        assert synced == [True] and not made.weights_lost
        numbers = made.metrics()
        assert numbers["rollout/server_restarts"] == 1 and 1 <= numbers["rollout/retries"] <= 3
        assert numbers["rollout/dropped_stale_version"] == numbers["rollout/dropped_unknown_version"] == 0
        told = capsys.readouterr().out
        url = re.escape(made.pool.servers[0].url)
        assert re.search(r"rollout server \S+ is out: .*\n", told)
        assert re.search(rf"rollout server {url} is well again, and waits for the next weight sync\n", told)
        assert re.search(rf"rollout server {url} serves again after \d+ s\n", told)


def test_a_server_that_never_comes_back_ends_requests_that_wait_for_weights(tmp_path):
    with engine(tmp_path, sync="distributed", restart_budget=0) as made:
        made.update_weights(weights(0), version=1)
        order(servers(made)[0], "die", where="/generate")
        with pytest.raises(RolloutError, match=r"none of 1 rollout servers can serve .* lost"):
            generate_and_sync_again(made, prompts(3), params(16), lambda: pytest.fail("no server can take them"))


def test_if_no_server_comes_back_the_error_asks_for_no_repeat(tmp_path):
    with led_engine(tmp_path, 2, num_servers=2, restart_budget=0) as made:
        bucket_a_tensor(made)
        made.update_weights(weights(0), version=1)
        for server in servers(made):
            order(server, "die", where="bucket 4")
        with pytest.raises(RolloutError, match="none of 2 rollout servers can serve") as caught:
            sync(made, seed=1, version=2)
        assert not isinstance(caught.value, UpdateBroken) and made.weight_version == 1


@pytest.mark.parametrize("fails", ["before", "as well"])
def test_a_step_that_times_out_while_a_call_fails_closes_the_group_and_logs_nothing(monkeypatch, fails):
    """This happens: a call to a server and the step that makes it have the same limit, sync_timeout_s."""
    closed, complaints = [], []
    monkeypatch.setattr(BroadcastGroup, "close", lambda self: closed.append(self))

    async def call() -> None:
        with suppress(asyncio.CancelledError):  # aiohttp does so when its own limit is reached
            await asyncio.sleep(0 if fails == "before" else 60)
        raise RequestFailed("no whole answer within 4 s")

    async def step() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["message"]))
        group = BroadcastGroup((), [])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(group._all(call(), delay_s=60), 0.1)
        assert closed == [group]
        await asyncio.sleep(0.01)

    asyncio.run(step())
    gc.collect()
    assert complaints == []
