"""2,048 requests in flight on two fake servers: nothing lost, nothing doubled, and what a request costs the client."""

from __future__ import annotations

import time

from tests.rollout.sglang.asserts import assert_whole
from tests.rollout.sglang.fake_server import fake_python
from tests.rollout.sglang.serving import FAST, engine, pace, params, prompts, servers, told, wait_for, weights

IN_FLIGHT = 2048


def test_thousands_of_requests_in_flight_lose_and_double_no_sample(tmp_path, capsys):
    python = fake_python(tmp_path, tokens_per_s=1)  # until all are in flight
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
