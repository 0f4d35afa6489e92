"""The engine on fake servers: samples, weight updates, and what reaches the trainer when servers fail."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dapo_mcore.errors import RolloutError
from dapo_mcore.observe.progress import NullProgress
from tests.rollout.sglang.asserts import all_serve, assert_whole
from tests.rollout.sglang.fake_server import fake_python
from tests.rollout.sglang.serving import (
    CONTEXT,
    FAST,
    SLOW,
    VOCAB,
    Raw,
    bucket_a_tensor,
    engine,
    given_by,
    order,
    params,
    prompts,
    servers,
    states,
    told,
    wait_for,
    weights,
)


def test_samples_come_back_in_order_with_tokens_and_logprobs(tmp_path):
    with engine(tmp_path, num_servers=2) as made:
        made.update_weights(weights(0), version=4)
        finished: list[int] = []
        made.on_progress = finished.append
        asked = prompts(100)
        rollouts = made.generate(asked, params(16))
        assert_whole(rollouts, asked, 16, version=4)
        np.testing.assert_allclose(rollouts[5].logprobs, -(rollouts[5].token_ids + 1) / VOCAB, rtol=1e-6)
        assert rollouts[5].token_ids.dtype == np.int32 and rollouts[5].logprobs.dtype == np.float32
        assert rollouts[5].loss_mask.all()
        assert len({rollout.seed for rollout in rollouts}) == 100
        assert sum(finished) == 100
        shares = [told(server)["counts"]["generated"] for server in servers(made)]
        assert sum(shares) == 100 and max(shares) - min(shares) <= 4
        assert made.generate([], params(16)) == []


@pytest.mark.parametrize("sync", ["disk", "distributed"])
def test_every_server_takes_every_tensor_of_the_stream(tmp_path, sync):
    with engine(tmp_path, num_servers=2, sync=sync) as made:
        for version, seed in ((0, 0), (1, 5)):
            made.update_weights(weights(seed), version)
            expected = {name: float(tensor.sum()) for name, tensor in weights(seed)}
            for server in servers(made):
                now = told(server)
                assert now["weight_version"].startswith(f"{version}-") and not now["session"]
                assert now["weights"] == pytest.approx(expected, rel=1e-4, abs=1e-4)
        numbers = made.metrics()
        assert numbers["sync/bytes"] == sum(tensor.nbytes for _, tensor in weights(0))
        assert numbers["sync/gb_per_s"] > 0 and numbers["rollout/servers_serving"] == 2
        if sync == "disk":
            assert [path.name for path in made.sender.root.iterdir()] == [made.pool.weight_version]
    if sync == "disk":
        assert not made.sender.root.exists()


def test_a_broadcast_in_many_buckets_brings_the_same_weights(tmp_path):
    with engine(tmp_path, sync="distributed") as made:
        bucket_a_tensor(made)
        made.update_weights(weights(2), version=0)
        (server,) = servers(made)
        now = told(server)
        assert now["counts"]["buckets"] == len(list(weights(2)))
        assert now["weights"] == pytest.approx({n: float(t.sum()) for n, t in weights(2)}, rel=1e-4, abs=1e-4)


def test_an_update_right_after_the_last_answer_kills_no_server(tmp_path):
    with engine(tmp_path) as made:
        made.update_weights(weights(0), version=1)
        asked, new = prompts(4), list(weights(1))
        assert_whole(made.generate(asked, params(8)), asked, 8, version=1)
        made.update_weights(iter(new), version=2)
        assert made.metrics()["rollout/servers_excluded"] == 0


@pytest.mark.parametrize("version", ["0.5.15", "0.5.20"])
def test_servers_of_versions_without_sessions_or_spans_work(tmp_path, version):
    with engine(tmp_path, python=fake_python(tmp_path, version), sync="distributed") as made:
        made.update_weights(weights(0), version=1)
        asked = prompts(3)
        assert_whole(made.generate(asked, params(8)), asked, 8, version=1)


MID_GENERATION: dict[str, Callable[[Raw], None]] = {
    "closes": lambda server: order(server, "close", count=5),
    "500s": lambda server: order(server, "status", value=500, count=5),
    "garbage": lambda server: order(server, "garbage", count=5),
    "drips": lambda server: order(server, "drip", count=5),
    "never ends": lambda server: order(server, "endless", count=5),
    "dies": lambda server: order(server, "die", value=0.1),
}


@pytest.mark.parametrize("fault", MID_GENERATION)
def test_a_server_that_fails_during_generation_loses_no_sample(tmp_path, fault):
    with engine(tmp_path, num_servers=2) as made:
        made.update_weights(weights(0), version=1)
        first, second = servers(made)
        MID_GENERATION[fault](first)
        asked = prompts(60)
        assert_whole(made.generate(asked, params(400)), asked, 400, version=1)
        numbers = made.metrics()
        assert numbers["rollout/retries"] >= 5 and numbers["rollout/servers_suspected"] >= 1
        all_serve(made)
        assert told(first)["weight_version"] == told(second)["weight_version"] == made.pool.weight_version
        later = made.metrics()
        restarts = numbers["rollout/server_restarts"] + later["rollout/server_restarts"]
        resyncs = numbers["rollout/servers_resynced"] + later["rollout/servers_resynced"]
        assert (restarts, resyncs) == ((1, 1) if fault == "dies" else (0, 0))


def test_a_health_check_finds_a_server_that_hangs_and_its_requests_move_to_another(tmp_path):
    with engine(tmp_path, num_servers=2, health_timeout_s=1.0) as made:
        made.update_weights(weights(0), version=1)
        os.kill(told(servers(made)[0])["pid"], signal.SIGSTOP)
        started = time.monotonic()
        asked = prompts(20)
        assert_whole(made.generate(asked, params(16)), asked, 16, version=1)
        assert time.monotonic() - started < 50  # request_timeout_s is 60
        assert made.metrics()["rollout/servers_suspected"] >= 1


def test_a_server_that_hangs_is_found_while_another_one_reloads_its_weights(tmp_path):
    """However long the reload takes: here it hangs, too."""
    with engine(tmp_path, num_servers=3, health_timeout_s=1.0, sync_timeout_s=60.0) as made:
        made.update_weights(weights(0), version=1)
        first, second, _ = servers(made)
        order(first, "edit", value={"weight_version": "default", "weight_versions": None})
        order(first, "hang", where="/update_weights_from_disk")
        made.generate(prompts(3), params(8))
        wait_for(lambda: told(first)["counts"].get("fault hang"))
        os.kill(told(second)["pid"], signal.SIGSTOP)
        started = time.monotonic()
        asked = prompts(20)
        assert_whole(made.generate(asked, params(16)), asked, 16, version=1)
        assert time.monotonic() - started < 50  # request_timeout_s and sync_timeout_s are 60


def test_a_partial_answer_of_an_aborted_request_is_dropped_whole(tmp_path):
    with engine(tmp_path, python=fake_python(tmp_path, tokens_per_s=SLOW)) as made:
        made.update_weights(weights(0), version=1)
        (server,) = servers(made)
        asked = prompts(8)
        future = made.submit(asked, params(400))
        wait_for(lambda: told(server)["running"] == 8)
        server.post("/abort_request", {"abort_all": True, "rid": ""})
        server.pace(FAST)
        assert_whole(future.result(), asked, 400, version=1)
        assert made.metrics()["rollout/dropped_aborted"] == 8


def test_a_response_that_a_server_cuts_short_ends_the_run_with_the_remedy(tmp_path):
    with engine(tmp_path, server_args={"max-total-tokens": 100}) as made:
        made.update_weights(weights(0), version=1)
        asked = prompts(4)
        assert_whole(made.generate(asked, params(95)), asked, 95, version=1)
        with pytest.raises(
            RolloutError,
            match=r"cut a response at 95 of at most 96 tokens, after a prompt of 3: .*max-total-tokens",
        ):
            made.generate(asked, params(96))


def test_a_response_may_fill_all_but_the_last_two_positions_of_the_context(tmp_path):
    with engine(tmp_path) as made:
        made.update_weights(weights(0), version=1)
        (asked,) = prompts(1)
        (rollout,) = made.generate([asked], params(CONTEXT - len(asked)))
        assert len(rollout.token_ids) == CONTEXT - len(asked) - 2 and rollout.truncated


def edited_versions(reason: str, old: str, new: str) -> dict[str, Any]:
    """Return the versions of an answer of 8 tokens that is dropped for `reason`."""
    spans = [{"version": new, "start": 0, "end": 3}, {"version": old, "start": 3, "end": 8}]
    return {
        "stale_version": {"weight_version": old, "weight_versions": None},
        "unknown_version": {"weight_version": "default", "weight_versions": None},
        "mixed_versions": {"weight_version": old, "weight_versions": spans},
    }[reason]


@pytest.mark.parametrize("reason", ["stale_version", "unknown_version", "mixed_versions"])
def test_samples_of_other_weights_never_reach_the_trainer(tmp_path, reason):
    with engine(tmp_path, num_servers=2) as made:
        made.update_weights(weights(0), version=1)
        old = made.pool.weight_version
        made.update_weights(weights(1), version=2)
        order(servers(made)[0], "edit", value=edited_versions(reason, old, made.pool.weight_version), count=4)
        asked = prompts(40)
        assert_whole(made.generate(asked, params(8)), asked, 8, version=2)
        numbers = made.metrics()
        assert 1 <= numbers[f"rollout/dropped_{reason}"] <= 4  # the re-sync may abort one on its way
        all_serve(made)
        # the server that gave wrong versions has reloaded the weights
        assert numbers["rollout/servers_resynced"] + made.metrics()["rollout/servers_resynced"] >= 1


def test_a_server_that_reports_success_but_keeps_its_version_is_taken_out(tmp_path):
    with engine(tmp_path, num_servers=2) as made:
        made.update_weights(weights(0), version=1)
        first, _ = servers(made)
        order(first, "ignored", where="version")
        made.update_weights(weights(1), version=2)
        asked = prompts(10)
        assert_whole(made.generate(asked, params(8)), asked, 8, version=2)
        assert made.metrics()["rollout/servers_excluded"] == 1
        all_serve(made)
        assert told(first)["weight_version"] == made.pool.weight_version


@pytest.mark.parametrize("sync", ["disk", "distributed"])
def test_a_server_that_dies_during_a_sync_gets_the_weights_before_it_serves_again(tmp_path, sync):
    with engine(tmp_path, num_servers=2, sync=sync, servers_per_group=1) as made:
        bucket_a_tensor(made)
        made.update_weights(weights(0), version=1)
        first, second = servers(made)
        order(first, "die", where="/update_weights_from_disk" if sync == "disk" else "bucket 5")
        made.update_weights(weights(1), version=2)
        assert made.weight_version == 2
        asked = prompts(30)
        assert_whole(made.generate(asked, params(16)), asked, 16, version=2)
        if sync == "distributed":  # no weights are kept, so it waits for the next update
            wait_for(lambda: states(made) == ["waiting", "serving"])
            made.update_weights(weights(3), version=3)
        all_serve(made)
        assert told(first)["weight_version"] == told(second)["weight_version"] == made.pool.weight_version
        assert told(first)["weights"] == pytest.approx(told(second)["weights"])
        numbers = made.metrics()
        assert numbers["rollout/servers_excluded"] == 1 and numbers["rollout/server_restarts"] == 1


def test_a_sync_from_disk_survives_the_death_of_the_only_server(tmp_path):
    with engine(tmp_path) as made:
        made.update_weights(weights(0), version=1)
        order(servers(made)[0], "die", where="/update_weights_from_disk")
        made.update_weights(weights(1), version=2)
        asked = prompts(4)
        assert_whole(made.generate(asked, params(8)), asked, 8, version=2)


def test_an_update_without_a_server_left_keeps_the_version_and_names_each_server(tmp_path):
    with engine(tmp_path, sync="distributed", restart_budget=0) as made:
        made.update_weights(weights(0), version=1)
        order(servers(made)[0], "die", where="bucket 1")
        with pytest.raises(RolloutError, match=r"none of 1 rollout servers can serve .*http://127.0.0.1:\d+"):
            made.update_weights(weights(1), version=2)
        assert made.weight_version == 1


def test_a_run_ends_when_the_restart_budget_is_spent(tmp_path):
    with engine(tmp_path, restart_budget=1) as made:
        made.update_weights(weights(0), version=1)
        for _ in range(2):
            all_serve(made)
            os.killpg(made.pool.servers[0].process.pid, signal.SIGKILL)
            wait_for(lambda: not made.pool.serving)
        with pytest.raises(RolloutError, match=r"all 1 restarts .* are spent"):
            made.generate(prompts(2), params(8))


class Lines(NullProgress):
    """A progress display that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def test_a_server_that_fails_three_times_in_a_row_at_one_step_ends_the_run_with_its_last_words(tmp_path):
    """Whatever the restart budget. Each restart is shown with the step and what the server wrote last."""
    screen = Lines()
    with engine(tmp_path, restart_budget=50, progress=screen) as made:
        made.update_weights(weights(0), version=0)
        for version in (1, 2):
            order(servers(made)[0], "die", where="/update_weights_from_disk")
            made.update_weights(weights(version), version)
        order(servers(made)[0], "die", where="/update_weights_from_disk")
        told = r"none of 1 .* lost: .*failed 3 times in a row at the same place \(weight update, load\).* it last wrote: .*server-0.log"
        with pytest.raises(RolloutError, match=told):
            made.update_weights(weights(3), version=3)
        assert made.metrics()["rollout/server_restarts"] == 2
    restarts = [line for line in screen.lines if "is started again" in line]
    assert len(restarts) == 2 and all("after it failed at: weight update, load" in line for line in restarts)
    assert "49 more restarts allowed" in restarts[0] and "ordered to die" in restarts[0]


def test_a_sample_that_always_fails_ends_the_run_with_the_last_problem(tmp_path):
    with engine(tmp_path, max_attempts=2) as made:
        made.update_weights(weights(0), version=1)
        order(servers(made)[0], "status", value=500, count=100)
        with pytest.raises(RolloutError, match=r"failed 2 times .*HTTP 500: ordered"):
            made.generate(prompts(1), params(8))


@pytest.mark.parametrize("sync", ["disk", "distributed"])
def test_a_stream_that_does_not_fit_the_model_is_drained_and_never_served(tmp_path, sync):
    with engine(tmp_path, sync=sync) as made:
        made.update_weights(weights(0), version=1)
        whole = list(weights(1))
        cut = [(name, tensor[..., :-1]) if name == "model.norm.weight" else (name, tensor) for name, tensor in whole]
        for stream, message in (
            (whole[:-1], f"weight version 2 lacks 1 of {len(whole)} tensors: lm_head.weight"),
            (cut, "model.norm.weight has shape [63], but [64] in the model"),
        ):
            left = iter(stream)
            with pytest.raises(RolloutError) as caught:
                made.update_weights(left, version=2)
            assert message in str(caught.value)
            assert list(left) == []
            assert made.weight_version == 1
        if sync == "disk":  # no server has seen any of it
            asked = prompts(2)
            assert_whole(made.generate(asked, params(8)), asked, 8, version=1)


def test_prompts_that_would_kill_a_server_are_refused_before_it_sees_them(tmp_path):
    with engine(tmp_path) as made:
        with pytest.raises(RolloutError, match="no weights yet"):
            made.generate(prompts(1), params(8))
        made.update_weights(weights(0), version=0)
        for prompt, message in ((np.zeros(0), "no tokens"), ([VOCAB], "token 64"), (np.ones(505), "that is 513")):
            with pytest.raises(RolloutError, match=message):
                made.generate([np.array(prompt, np.int32)], params(8))


def test_a_given_server_that_never_takes_the_weights_is_given_up(tmp_path):
    """For example because it does not see sync_dir. The update raises an error and does not wait for ever."""
    with engine(tmp_path) as outer, engine(tmp_path / "other", **given_by(outer, tmp_path)) as made:
        order(servers(made)[0], "status", where="/update_weights_from_disk", value=400, count=100)
        with pytest.raises(RolloutError, match=r"none of 1 rollout servers .* lost: .*HTTP 400: ordered"):
            made.update_weights(weights(0), version=1)
        assert made.weight_version == -1


def test_a_reload_beyond_sync_timeout_s_is_shown_with_the_limit(tmp_path):
    with engine(tmp_path, sync_timeout_s=3.0) as made:
        made.update_weights(weights(0), version=1)
        (server,) = servers(made)
        order(server, "hang", where="/update_weights_from_disk", count=100)
        order(server, "edit", value={"weight_version": "default", "weight_versions": None})
        future = made.submit(prompts(1), params(8))
        (waiting,) = made.pool.servers
        wait_for(lambda: "within 3 s" in waiting.problem, otherwise=lambda: waiting.problem)
        future.cancel()


def test_a_server_restarted_between_broadcasts_takes_part_in_the_next_one(tmp_path):
    with engine(tmp_path, num_servers=2, sync="distributed") as made:
        made.update_weights(weights(0), version=1)
        first, _ = servers(made)
        os.kill(told(first)["pid"], signal.SIGKILL)
        asked = prompts(20)
        assert_whole(made.generate(asked, params(16)), asked, 16, version=1)
        wait_for(lambda: states(made)[0] == "waiting")
        made.update_weights(weights(1), version=2)
        assert len(made.pool.serving) == 2 and made.metrics()["rollout/servers_excluded"] == 0
