"""Requests that come and go on fake servers: what continuous refill asks of the engine."""

from __future__ import annotations

import asyncio
from concurrent.futures import CancelledError

import pytest

from dapo_mcore.errors import RolloutError
from dapo_mcore.rollout.sglang.client.api import Keys, ServerClient
from dapo_mcore.rollout.sglang.pool.pool import ServerPool
from dapo_mcore.rollout.sglang.pool.server import PoolSettings, Server
from dapo_mcore.types import ContinuousEngine
from tests.rollout.sglang.asserts import assert_whole
from tests.rollout.sglang.fake_server import fake_python
from tests.rollout.sglang.serving import FAST, SLOW, engine, pace, params, prompts, servers, told, wait_for, weights


def test_submitted_groups_are_generated_side_by_side(tmp_path):
    with engine(tmp_path, python=fake_python(tmp_path, tokens_per_s=SLOW)) as made:
        assert isinstance(made, ContinuousEngine)
        with pytest.raises(RolloutError, match="no weights yet"):
            made.submit(prompts(1), params(8))
        made.update_weights(weights(0), version=1)
        asked = prompts(30)
        (server,) = servers(made)
        long = made.submit(asked[:10], params(400))
        wait_for(lambda: told(server)["running"] == 10)
        short = made.submit(asked[10:], params(8))
        assert_whole(short.result(), asked[10:], 8, version=1)
        assert not long.done() and told(server)["counts"]["most_running"] > 10
        server.pace(FAST)
        assert_whole(long.result(), asked[:10], 400, version=1)


def test_a_cancelled_group_leaves_its_server_and_the_others_alone(tmp_path):
    with engine(tmp_path, num_servers=2, python=fake_python(tmp_path, tokens_per_s=SLOW)) as made:
        made.update_weights(weights(0), version=1)
        asked = prompts(12)
        kept, given_up = made.submit(asked[:4], params(400)), made.submit(asked[4:], params(400))
        wait_for(lambda: sum(told(server)["running"] for server in servers(made)) == 12)
        assert given_up.cancel()
        wait_for(lambda: sum(told(server)["running"] for server in servers(made)) == 4)
        pace(made, FAST)
        with pytest.raises(CancelledError):
            given_up.result()
        assert_whole(kept.result(), asked[:4], 400, version=1)
        numbers = made.metrics()
        assert numbers["rollout/retries"] == numbers["rollout/servers_suspected"] == 0
        made.update_weights(weights(1), version=2)
        assert_whole(made.generate(asked, params(8)), asked, 8, version=2)


def test_after_all_requests_were_cancelled_their_servers_are_idle_and_no_new_ones_are_taken(tmp_path):
    with engine(tmp_path, python=fake_python(tmp_path, tokens_per_s=SLOW)) as made:
        made.update_weights(weights(0), version=1)
        (server,) = servers(made)
        futures = [made.submit(prompts(2), params(400)), made.submit(prompts(2), params(400))]
        wait_for(lambda: told(server)["running"] == 4)
        made.cancel_requests()
        for future in futures:
            with pytest.raises(CancelledError):
                future.result()
        wait_for(lambda: told(server)["running"] == 0)
        with pytest.raises(CancelledError):
            made.generate(prompts(1), params(8))
        assert told(server)["counts"]["generated"] == 4


def test_a_place_that_a_cancelled_request_was_told_of_goes_to_the_next():
    """Python's Condition forgets it before 3.13: with all others waiting, too, nothing would ever go on."""

    async def ends_within(seconds: float) -> None:
        server = Server(ServerClient(None, "http://127.0.0.1:1", Keys(), 1.0), state="serving")
        limits = dict(max_in_flight=1, health_interval_s=60.0, health_timeout_s=1.0, weights_timeout_s=1.0)
        pool = ServerPool([server], PoolSettings(**limits, start_timeout_s=1.0, step_timeout_s=1.0, restart_budget=0))
        answered = asyncio.Event()
        running = asyncio.create_task(pool.call(await pool.acquire(), answered.wait()))
        await asyncio.sleep(0)
        told, next_one = asyncio.create_task(pool.acquire()), asyncio.create_task(pool.acquire())
        await asyncio.sleep(0)
        answered.set()
        while not running.done():  # its last act notifies the first that waits
            await asyncio.sleep(0)
        told.cancel()
        assert await asyncio.wait_for(next_one, seconds) is server
        await running
        await pool.close()

    asyncio.run(ends_within(5.0))
