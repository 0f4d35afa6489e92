"""SGLang's real router, from the environment of the real servers, in front of given servers: fake ones and a real one."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dapo_mcore.config.sglang import SGLangConfig
from dapo_mcore.rollout.sglang.client.api import Keys
from dapo_mcore.rollout.sglang.engine import SGLangEngine
from dapo_mcore.rollout.sglang.launch.servers import reserve_port
from tests.rollout.sglang.asserts import assert_whole
from tests.rollout.sglang.fake_server import fake_python
from tests.rollout.sglang.serving import (
    FAST,
    Raw,
    engine,
    given_by,
    order,
    pace,
    params,
    prompts,
    real_python,
    servers,
    told,
    wait_for,
    weights,
)


@contextmanager
def routed(
    folder: Path, python: Path | None = None, num_servers: int = 2
) -> Iterator[tuple[SGLangEngine, subprocess.Popen]]:
    """Yield an engine on given servers that generates through the real router, and the router's process."""
    with engine(folder, python=python, num_servers=num_servers, health_timeout_s=2.0) as outer:
        behind = servers(outer)
        with real_router(folder, [server.url for server in behind], behind[0].keys) as (url, router):
            given = dict(**given_by(outer, folder), router_url=url, health_timeout_s=2.0)
            with engine(folder / "other", **given) as made:
                yield made, router


@contextmanager
def real_router(folder: Path, urls: list[str], keys: Keys) -> Iterator[tuple[str, subprocess.Popen]]:
    python = real_python()
    with reserve_port(SGLangConfig(), "127.0.0.1", 0) as port, reserve_port(SGLangConfig(), "127.0.0.1", 0) as metrics:
        url = f"http://127.0.0.1:{port.getsockname()[1]}"
        options = {"host": "127.0.0.1", "port": port.getsockname()[1], "prometheus-port": metrics.getsockname()[1]}
        options |= {"api-key": keys.api, "policy": "round_robin", "worker-startup-check-interval": 1}
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        command = [str(python), "-P", "-m", "sglang_router.launch_router", *words, "--worker-urls", *urls]
        log = folder / "router.log"
        with open(log, "wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            wait_for(lambda: knows(Raw(url, keys), len(urls)), 60, log.read_text)
            yield url, process
        finally:
            process.kill()
            process.wait()


def knows(router: Raw, num_workers: int) -> bool:
    try:
        status, answer = router.get("/workers")
        return status == 200 and sum(worker["is_healthy"] for worker in answer["workers"]) == num_workers
    except OSError:
        return False


@pytest.mark.sglang
def test_the_router_spreads_samples_and_every_server_follows_the_weights(tmp_path):
    with routed(tmp_path) as (made, _):
        for version in (1, 2):
            made.update_weights(weights(version), version=version)
            asked = prompts(6)
            assert_whole(made.generate(asked, params(8)), asked, 8, version=version)
        assert [told(server)["counts"]["generated"] for server in servers(made)] == [6, 6]
        assert made.metrics()["rollout/retries"] == 0


@pytest.mark.sglang
def test_cancelled_requests_are_aborted_on_the_servers_behind_the_router(tmp_path):
    with routed(tmp_path, fake_python(tmp_path, tokens_per_s=20)) as (made, _):
        made.update_weights(weights(0), version=1)
        future = made.submit(prompts(4), params(400))
        wait_for(lambda: [told(server)["running"] for server in servers(made)] == [2, 2])
        future.cancel()
        wait_for(lambda: [told(server)["running"] for server in servers(made)] == [0, 0])
        wait_for(lambda: [told(server)["counts"].get("aborts") for server in servers(made)] == [4, 4])


@pytest.mark.sglang
def test_requests_to_a_router_that_hangs_are_sent_again(tmp_path):
    with routed(tmp_path, fake_python(tmp_path, tokens_per_s=20)) as (made, router):
        made.update_weights(weights(0), version=1)
        asked = prompts(4)
        future = made.submit(asked, params(400))
        wait_for(lambda: sum(told(server)["running"] for server in servers(made)) == 4)
        router.send_signal(signal.SIGSTOP)
        wait_for(lambda: made.metrics()["rollout/retries"], 30)  # request_timeout_s is 60
        router.send_signal(signal.SIGCONT)
        pace(made, FAST)
        assert_whole(future.result(), asked, 400, version=1)


@pytest.mark.sglang
def test_samples_of_a_failing_server_behind_the_router_come_from_the_other(tmp_path):
    with routed(tmp_path) as (made, _):
        made.update_weights(weights(0), version=1)
        order(servers(made)[0], "status", value=500, count=3)
        asked = prompts(8)
        assert_whole(made.generate(asked, params(8)), asked, 8, version=1)


@pytest.mark.sglang
def test_a_real_server_behind_the_router_generates_with_the_weights_it_was_given(tmp_path):
    with routed(tmp_path, real_python(), num_servers=1) as (made, _):
        for version in (1, 2):
            made.update_weights(weights(version), version=version)
            rollouts = made.generate(prompts(4), params(8))
            assert [rollout.weight_version for rollout in rollouts] == [version] * 4
