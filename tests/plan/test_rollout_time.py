"""Time of generation: by hand where all responses are alike, and its tail where they are not."""

from __future__ import annotations

from typing import Any

import pytest

from dapo_mcore.plan.batch import batch_of
from dapo_mcore.plan.job import Job
from dapo_mcore.plan.memory import memory_of
from dapo_mcore.plan.rollout_time import RolloutTime, decode_cost, evaluation_times, rollout_time
from tests.plan.jobs import job

ALIKE = {"response_spread": 0.0, "mean_response_tokens": 1000.0, "mean_prompt_tokens": 100.0}


def timed(own: Job) -> RolloutTime:
    batch = batch_of(own)
    return rollout_time(own, batch, memory_of(own, batch))


def test_a_decode_step_by_hand() -> None:
    cost = decode_cost(job())
    bandwidth = 0.75 * 3350e9
    weights = 2 * 32_763_876_352 / 4
    assert cost.fixed == pytest.approx(0.006 + 2 * 64 * 10e-6 + weights / bandwidth)
    assert cost.per_token == pytest.approx(64 * 2 * 2 * 128 * 2 / bandwidth)
    flops = 2 * (32_763_876_352 - 152064 * 5120)
    sums = 2 * 64 * 2 * 2 * 5120 * 3 / 4 / (0.7 * 450e9)
    assert cost.per_request == pytest.approx(flops / (0.5 * 989e12 * 4) + sums, rel=1e-3)
    assert cost.step(10, 5000) == pytest.approx(cost.fixed + 10 * cost.per_request + 5000 * cost.per_token)


def test_responses_that_are_alike_by_hand() -> None:
    """24,576 responses on 32 servers: 768 each, 256 at a time, so three turns of 1,000 steps."""
    own = job(assumed=ALIKE, rollout__sglang__max_in_flight=256)
    found, cost = timed(own), decode_cost(own)
    assert (found.num_servers, found.per_server) == (32, 256)
    mean_cache = 256 * (100 + 500)
    assert found.generate == pytest.approx(3 * 1000 * cost.step(256, mean_cache), rel=0.01)
    assert found.tail == 0
    assert found.tokens_per_s == pytest.approx(24_576_000 / (found.generate + found.prefill))


def test_an_evaluation_by_hand() -> None:
    """A thousand responses of 1,000 tokens on 32 servers: 32 on the fullest, all at once; 30 prompts × 4 are 4 on each."""
    sets = {"unknown": {"files": ["unused"]}, "aime": {"files": ["unused"], "limit": 30, "samples_per_prompt": 4}}
    own = job(assumed=ALIKE, eval={"sets": sets})
    unknown, aime = evaluation_times(own, memory_of(own, batch_of(own)))
    assert (unknown.responses, aime.responses, aime.limit) == (1000, 120, 20480)
    for found, requests in ((unknown, 32), (aime, 4)):
        assert found.seconds == pytest.approx(1000 * decode_cost(own).step(requests, requests * 600), rel=0.01)


def test_longer_responses_of_an_evaluation_take_longer() -> None:
    """Lengths are those of training but for the cut: a response of the longest kind is alone at the end."""
    sets = {"short": {"files": ["unused"]}, "long": {"files": ["unused"], "max_response_tokens": 40960}}
    own = job(assumed={"response_spread": 3.0}, eval={"sets": sets})
    short, long = evaluation_times(own, memory_of(own, batch_of(own)))
    assert (short.limit, long.limit) == (20480, 40960)
    assert long.seconds > short.seconds + 20480 * decode_cost(own).fixed


def test_the_cache_limits_how_many_are_decoded_at_once() -> None:
    own = job(assumed=ALIKE)
    memory = memory_of(own, batch_of(own))
    assert timed(own).per_server == min(768, int(memory.server.kv_tokens / (100 + 500)), 1024)
    longer = job(assumed=ALIKE | {"mean_response_tokens": 10000.0})
    assert timed(longer).per_server == int(memory.server.kv_tokens / (100 + 5000)) < 768


def test_long_responses_finish_alone_unless_other_groups_fill_the_tail() -> None:
    waits = timed(job())
    assert 0 < waits.tail < waits.generate
    going_on = {"sampling__on_full": "keep", "algo__tis": {"mode": "truncate"}, "rollout__sglang__colocated": False}
    keeps = timed(job(nodes=32, sampling__max_staleness=2, **going_on))
    assert keeps.generate < waits.generate
    alike = timed(job(assumed=ALIKE | {"mean_response_tokens": 6555.0}))
    assert waits.generate > alike.generate  # the same tokens


def test_rank_0_can_be_the_limit() -> None:
    own = job(assumed={"host_ns_per_token": 1e5})
    found = timed(own)
    assert found.host == pytest.approx(batch_of(own).responses * batch_of(own).mean_response * 1e-4)
    assert found.total == found.host > found.generate and found.is_host_bound
    assert not timed(job()).is_host_bound


def test_the_embedded_engine_is_one_slow_server() -> None:
    overrides: dict[str, Any] = {"rollout": {"engine": "embedded", "max_batch": 64}}
    small = job("Qwen2.5-1.5B", nodes=1, parallel={}, **overrides)
    found = timed(small)
    assert (found.num_servers, found.per_server) == (1, 64)
    faster = timed(job("Qwen2.5-1.5B", nodes=1, parallel={}, assumed={"embedded_slowdown": 1.0}, **overrides))
    assert found.generate == pytest.approx(5 * faster.generate)
