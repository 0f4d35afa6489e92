"""Requests that continue after weight updates, on fake servers: which answers the engine accepts, and which it asks for again."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from dapo_mcore.errors import ConfigError
from dapo_mcore.rollout.sglang.engine import SGLangEngine
from dapo_mcore.types import Rollout
from tests.rollout.sglang.asserts import all_serve, assert_whole
from tests.rollout.sglang.fake_server import fake_python
from tests.rollout.sglang.serving import (
    FAST,
    SLOW,
    bare_server,
    engine,
    given_by,
    order,
    pace,
    params,
    prompts,
    servers,
    told,
    wait_for,
    weights,
)

LENGTH = 300


@pytest.fixture
def python(tmp_path) -> Path:
    """Return the interpreter of a server that is slow until `finished` makes it fast."""
    return fake_python(tmp_path, tokens_per_s=SLOW)


def in_flight(made: SGLangEngine, asked: list[np.ndarray]) -> Future[list[Rollout]]:
    """Submit requests for `asked` and wait until each has some tokens."""
    future = made.submit(asked, params(LENGTH))
    wait_for(lambda: sum(told(server)["running"] for server in servers(made)) == len(asked))
    for server in servers(made):
        server.tokens_later()
    return future


def finished(made: SGLangEngine, future: Future[list[Rollout]]) -> list[Rollout]:
    assert not future.done(), "nothing was in flight"
    pace(made, FAST)
    return future.result()


NEW = list(weights(1))  # made once: it takes longer than an update


def assert_two_stretches(rollout: Rollout, prompt: np.ndarray, old: int, new: int) -> None:
    assert rollout.token_ids.tolist() == np.resize(prompt, LENGTH).tolist() and rollout.finish_reason == "length"
    (start, first), (middle, second) = rollout.version_spans
    assert (start, first, second) == (0, old, new) and 0 < middle < LENGTH and rollout.weight_version == old


@pytest.mark.parametrize("sync", ["disk", "distributed"])
def test_requests_in_flight_continue_with_the_new_weights(tmp_path, python, sync):
    with engine(tmp_path, num_servers=2, python=python, sync=sync, max_lag=1) as made:
        made.update_weights(weights(0), version=1)
        asked = prompts(12)
        future = in_flight(made, asked)
        made.update_weights(iter(NEW), version=2)
        later = made.submit(asked, params(8))
        for rollout, prompt in zip(finished(made, future), asked, strict=True):
            assert_two_stretches(rollout, prompt, 1, 2)
        assert_whole(later.result(), asked, 8, version=2)
        numbers = made.metrics()
        assert all(count == 0 for name, count in numbers.items() if "dropped" in name or "retries" in name)


def test_without_max_lag_an_update_aborts_requests_and_they_are_sent_again(tmp_path, python):
    with engine(tmp_path, python=python) as made:
        made.update_weights(weights(0), version=1)
        asked = prompts(4)
        future = in_flight(made, asked)
        made.update_weights(iter(NEW), version=2)
        assert_whole(finished(made, future), asked, LENGTH, version=2)
        assert made.metrics()["rollout/dropped_aborted"] == 4


def test_a_response_with_tokens_older_than_max_lag_is_dropped_whole(tmp_path, python):
    with engine(tmp_path, python=python, max_lag=1) as made:
        made.update_weights(weights(0), version=1)
        asked = prompts(2)
        future = in_flight(made, asked)
        for version in (2, 3):
            made.update_weights(iter(NEW), version)
            servers(made)[0].tokens_later()
        for rollout, prompt in zip(finished(made, future), asked, strict=True):
            assert rollout.weight_version >= 2 and rollout.token_ids.tolist() == np.resize(prompt, LENGTH).tolist()
        assert made.metrics()["rollout/dropped_stale_version"] >= 1


@pytest.mark.parametrize("fault", ["dies", "refuses"])
def test_requests_of_a_server_that_fails_the_update_start_again_elsewhere(tmp_path, python, fault):
    with engine(tmp_path, num_servers=2, python=python, max_lag=1) as made:
        made.update_weights(weights(0), version=1)
        asked = prompts(12)
        future = in_flight(made, asked)
        first, _ = servers(made)
        kind = {"kind": "die"} if fault == "dies" else {"kind": "status", "value": 400}
        order(first, **kind, where="/update_weights_from_disk")
        made.update_weights(iter(NEW), version=2)
        rollouts = finished(made, future)
        resumed = [rollout for rollout in rollouts if rollout.version_spans]
        assert len(resumed) == 6, "those of the other server"
        for rollout, prompt in zip(rollouts, asked, strict=True):
            if rollout.version_spans:
                assert_two_stretches(rollout, prompt, 1, 2)
            else:
                assert_whole([rollout], [prompt], LENGTH, version=2)
        numbers = made.metrics()
        assert numbers["rollout/retries"] == 6 and numbers["rollout/servers_excluded"] == 1
        all_serve(made)
        assert_whole(made.generate(asked, params(8)), asked, 8, version=2)


def test_requests_of_a_server_that_dies_after_the_update_are_sent_again(tmp_path, python):
    with engine(tmp_path, num_servers=2, python=python, max_lag=1) as made:
        made.update_weights(weights(0), version=1)
        asked = prompts(6)
        future = in_flight(made, asked)
        made.update_weights(iter(NEW), version=2)
        os.killpg(made.pool.servers[0].process.pid, signal.SIGKILL)
        rollouts = finished(made, future)
        assert sorted(len(rollout.version_spans) for rollout in rollouts) == [0, 0, 0, 2, 2, 2]
        assert all(r.token_ids.tolist() == np.resize(p, LENGTH).tolist() for r, p in zip(rollouts, asked))


def test_a_health_check_that_begins_during_an_update_is_ignored(tmp_path, python):
    """A paused server reports that it is unhealthy, perhaps only when the update is over."""
    with engine(tmp_path, python=python, max_lag=4, health_interval_s=0.05) as made:
        made.update_weights(weights(0), version=1)
        asked = prompts(4)
        future = in_flight(made, asked)
        for version in range(2, 6):
            made.update_weights(iter(NEW), version)
            time.sleep(0.25)  # the fake server reports that it is unhealthy after 0.2 s
        assert {rollout.weight_version for rollout in finished(made, future)} == {1}
        assert made.metrics()["rollout/servers_suspected"] == 0


def test_generate_accepts_only_the_current_weights_while_submitted_requests_continue(tmp_path, python):
    """As an evaluation beside requests in flight."""
    with engine(tmp_path, python=python, max_lag=1) as made:
        made.update_weights(weights(0), version=1)
        old = made.pool.weight_version
        pending = in_flight(made, prompts(2))
        made.update_weights(iter(NEW), version=2)
        spans = [{"version": old, "start": 0, "end": 3}, {"version": made.pool.weight_version, "start": 3, "end": 8}]
        order(servers(made)[0], "edit", value={"weight_version": made.pool.weight_version, "weight_versions": spans})
        asked = prompts(5)
        assert_whole(made.generate(asked, params(8)), asked, 8, version=2)
        assert made.metrics()["rollout/dropped_mixed_versions"] == 1
        assert all(rollout.weight_version in (1, 2) for rollout in finished(made, pending))


def test_a_server_whose_requests_end_at_an_update_is_refused(tmp_path):
    """One that the run would start is refused before it starts."""
    told = r"has SGLang 0.5.20, .*sampling.on_full keep needs 0.5.21 or newer: update SGLang"
    old = fake_python(tmp_path, "0.5.20")
    with pytest.raises(ConfigError, match=told), engine(tmp_path, python=old, max_lag=1):
        pass
    assert not (tmp_path / "servers").exists()
    with bare_server(old, tmp_path / "given") as server:
        given = dict(urls=[server.url], key_file=str(tmp_path / "given/keys.json"))
        with pytest.raises(ConfigError, match=told), engine(tmp_path, python=old, max_lag=1, **given):
            pass


def test_closing_aborts_the_requests_on_given_servers(tmp_path, python):
    with engine(tmp_path, python=python) as outer:
        with engine(tmp_path / "other", **given_by(outer, tmp_path), max_lag=1) as made:
            made.update_weights(weights(0), version=1)
            future = in_flight(made, prompts(20))
        assert future.cancelled()
        (server,) = servers(outer)
        assert told(server)["counts"]["aborts"] == 20
        wait_for(lambda: told(server)["running"] == 0)
