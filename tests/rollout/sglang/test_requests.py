"""Requests that start and end at any time, on fake servers: what continuous refill needs of the engine."""

from __future__ import annotations

from concurrent.futures import CancelledError

import pytest

from dapo_mcore.errors import RolloutError
from dapo_mcore.types import ContinuousEngine
from tests.rollout.sglang.asserts import assert_whole
from tests.rollout.sglang.fake_server import fake_python
from tests.rollout.sglang.serving import FAST, SLOW, engine, pace, params, prompts, servers, told, wait_for, weights


def test_submitted_groups_are_generated_at_the_same_time(tmp_path):
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


def test_cancelling_a_group_aborts_its_requests_and_no_others(tmp_path):
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


def test_cancel_requests_aborts_all_and_no_new_ones_start(tmp_path):
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
