"""Which server generates a request: thousands in flight, requests that wait for room, and a router in front of the servers."""

from __future__ import annotations

import asyncio
import time

from dapo_mcore.rollout.sglang.client.api import Keys, ServerClient
from dapo_mcore.rollout.sglang.pool.pool import ServerPool
from dapo_mcore.rollout.sglang.pool.server import Server
from tests.rollout.sglang.asserts import all_serve, assert_whole
from tests.rollout.sglang.fake_server import fake_python
from tests.rollout.sglang.serving import (
    FAST,
    engine,
    given_by,
    order,
    pace,
    params,
    pool_settings,
    processes,
    prompts,
    servers,
    states,
    told,
    wait_for,
    weights,
)

IN_FLIGHT = 2048


def test_of_thousands_of_requests_in_flight_each_is_answered_once(tmp_path, capsys):
    python = fake_python(tmp_path, tokens_per_s=1, keep_alive_s=120)  # slow until all are in flight
    patient = dict(health_interval_s=60.0, connect_timeout_s=120.0, read_timeout_s=120.0, request_timeout_s=600.0)
    with engine(tmp_path, python=python, num_servers=2, max_in_flight=IN_FLIGHT, **patient) as made:
        made.update_weights(weights(0), version=1)
        asked = prompts(IN_FLIGHT)
        assert len({prompt.tobytes() for prompt in asked}) == IN_FLIGHT
        wall, cpu = time.perf_counter(), time.process_time()
        future = made.submit(asked, params(400))
        wait_for(lambda: sum(told(server)["running"] for server in servers(made)) == IN_FLIGHT, 300)
        pace(made, FAST)
        rollouts = future.result()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        assert_whole(rollouts, asked, 400, version=1)
        counts = [told(server)["counts"] for server in servers(made)]
        assert sum(count["generated"] for count in counts) == IN_FLIGHT and made.metrics()["rollout/retries"] == 0
    with capsys.disabled():
        print(
            f"\n{IN_FLIGHT} requests in flight: client CPU {1e3 * cpu / IN_FLIGHT:.2f} ms a request, wall {wall:.1f} s"
        )


def test_room_promised_to_a_cancelled_request_goes_to_the_next():
    """Before Python 3.13 a Condition loses that wake-up, and the requests that wait would wait for ever."""

    async def ends_within(seconds: float) -> None:
        server = Server(ServerClient(None, "http://127.0.0.1:1", Keys(), 1.0), state="serving")
        pool = ServerPool([server], pool_settings())
        answered = asyncio.Event()
        running = asyncio.create_task(pool.call(await pool.acquire(), answered.wait()))
        await asyncio.sleep(0)
        told, next_one = asyncio.create_task(pool.acquire()), asyncio.create_task(pool.acquire())
        await asyncio.sleep(0)
        answered.set()
        while not running.done():  # in its last step it wakes the first that waits
            await asyncio.sleep(0)
        told.cancel()
        assert await asyncio.wait_for(next_one, seconds) is server
        await running
        await pool.close()

    asyncio.run(ends_within(5.0))


def test_a_router_generates_while_weights_go_to_the_servers(tmp_path):
    """One server plays the router. Closing the engine leaves given servers running."""
    with engine(tmp_path, num_servers=2) as outer:
        given = given_by(outer, tmp_path)
        with engine(tmp_path / "other", **given, router_url=given["urls"][0]) as made:
            made.update_weights(weights(0), version=1)
            asked = prompts(5)
            assert_whole(made.generate(asked, params(8)), asked, 8, version=1)
            assert [told(server)["counts"].get("generated", 0) for server in servers(made)] == [5, 0]
            assert {told(server)["weight_version"] for server in servers(made)} == {made.pool.weight_version}
        assert all(process.alive for process in processes(outer))


def test_failures_of_a_server_behind_a_router_are_forgotten_after_each_good_update(tmp_path):
    """Answers come from the router, so none shows that the server works."""
    with engine(tmp_path, num_servers=2) as outer:
        given = given_by(outer, tmp_path)
        with engine(tmp_path / "other", **given, router_url=given["urls"][0]) as made:
            for version in range(6):
                order(servers(made)[1], "status", where="/update_weights_from_disk", value=500)
                made.update_weights(weights(0), version=2 * version)
                all_serve(made)
                made.update_weights(weights(0), version=2 * version + 1)
                assert states(made)[1] == "serving"
