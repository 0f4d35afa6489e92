"""Servers that fail at random moments of generation and weight updates: what must hold whatever happens.

Each run is drawn from a seed, but how threads and processes interleave is not: what is asserted holds for every order.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from dapo_mcore.architecture.manifest import WeightManifest
from dapo_mcore.errors import UpdateBroken
from dapo_mcore.rollout.sglang import requests
from dapo_mcore.rollout.sglang.engine import SGLangEngine
from dapo_mcore.types import Rollout
from tests.rollout.sglang.asserts import alive, assert_whole
from tests.rollout.sglang.fake_server import fake_python
from tests.rollout.sglang.serving import (
    bucket_a_tensor,
    engine,
    order,
    params,
    processes,
    prompts,
    servers,
    states,
    tiny_config,
    told,
    wait_for,
)

SHAPES = WeightManifest.of_config(tiny_config()).shapes
CALLS = ["/pause_generation", "/continue_generation", "/model_info", "/abort_request"]
TURNS = ["/pause_generation", "/continue_generation", "/release_memory_occupation", "/resume_memory_occupation"]
SYNC_CALLS = {
    "disk": ["/update_weights_from_disk"],
    "distributed": ["/begin_weight_update", "/end_weight_update", "/init_weights_update_group",
                    "/update_weights_from_distributed", "/destroy_weights_update_group", "bucket 2"],
    "tensor": ["/begin_weight_update", "/end_weight_update", "/update_weights_from_tensor", "bucket 2"],
}  # fmt: skip
TIMEOUTS = dict(
    health_interval_s=0.3,
    health_timeout_s=3.0,
    start_timeout_s=120.0,
    sync_timeout_s=20.0,
    request_timeout_s=10.0,
    read_timeout_s=1.5,
    restart_budget=1000,
    max_attempts=30,
)
LONGEST_S = 300.0


def stream(version: int) -> list[tuple[str, torch.Tensor]]:
    """Return weights of which every 50th value is their version."""
    weights = [(name, torch.ones(shape)) for name, shape in SHAPES.items()]
    for _, tensor in weights:
        tensor.view(-1)[::50] = version
    return weights


class Chaos:
    """An engine whose servers fail. If all have lost their weights, they get them again, as handover.py does."""

    def __init__(self, made: SGLangEngine, luck: random.Random, sync: str, lag: int, colocated: bool):
        self.made, self.luck, self.sync, self.lag, self.colocated = made, luck, sync, lag, colocated
        self.version, self.num_broken, self.num_lies, self.num_synced_again = 0, 0, 0, 0

    def trouble(self, count: int, moments: list[str]) -> None:
        for _ in range(count):
            number = self.luck.randrange(len(processes(self.made)))
            with suppress(OSError, AssertionError):  # the server is down already
                self.harm(number, self.luck.choice(moments))

    def harm(self, number: int, moment: str) -> None:
        """Harm one server. `moment` is `process` (a signal to it), or the kind of request that fails: `answers`, `calls`, `turns`."""
        luck, process = self.luck, processes(self.made)[number]
        count, where = luck.randint(1, 3), "/generate"
        if moment == "process":
            os.killpg(process.pid, luck.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP)))
            return
        if moment == "answers":
            kind = luck.choice(["close", "status", "garbage", "drip", "hang", "endless", "die", "edit"])
        else:
            kind = luck.choice(["close", "status", "status", "hang", "die", "die", "ignored", "garbage"])
            where = luck.choice(TURNS if moment == "turns" else CALLS + SYNC_CALLS[self.sync])
            where = {"ignored": "version", "garbage": "/model_info"}.get(kind, where)
        value = {"status": luck.choice((400, 500)), "die": luck.choice((0, 0.1))}.get(kind)
        if kind == "status" and where == "/generate":
            value = 500
        if kind == "edit":
            self.num_lies += count
            value = {"weight_version": luck.choice(("default", "7-old")), "weight_versions": None}
        order(servers(self.made)[number], kind, where=where, value=value, count=count)

    def kill_all(self) -> None:
        for process in processes(self.made):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def update(self) -> None:
        """Send the next version and check the servers."""
        self.bring(self.version + 1)
        self.check_servers()

    def sync_again(self) -> None:
        """Send the current version again."""
        self.num_synced_again += 1
        if self.colocated:
            self.made.release()
        self.bring(self.version)

    def bring(self, version: int) -> None:
        for tries_left in (2, 1, 0):
            try:
                self.send(version)
                if self.colocated:
                    self.trouble(self.luck.randint(0, 1), ["turns", "process"])
                    self.made.resume()
                break
            except UpdateBroken:
                self.num_broken += 1
                assert self.sync != "disk"
                if not tries_left:
                    raise
                if self.colocated:
                    self.made.release()

    def send(self, version: int) -> None:
        started = time.monotonic()
        weights = iter(stream(version))
        try:
            self.made.update_weights(weights, version)
            self.version = version
        finally:
            assert time.monotonic() - started < LONGEST_S
            assert next(weights, None) is None, "drained"
            assert self.made.weight_version == (self.version or -1)

    def release(self) -> None:
        if self.colocated:
            self.trouble(self.luck.randint(0, 1), ["turns", "process"])
            self.made.release()

    def check_servers(self) -> None:
        """Assert that every serving server has exactly the current weights."""
        tag = self.made.pool.weight_version
        assert self.made.weight_version == self.version
        for server, raw in zip(self.made.pool.servers, servers(self.made)):
            pid = server.process.pid
            if server.state != "serving":
                continue
            try:
                now = told(raw)
            except OSError:  # the server has died meanwhile
                continue
            if server.state == "serving" and server.process.pid == pid:
                assert now["weight_version"] == tag and not now["session"], now
                sums = {name: float(tensor.sum()) for name, tensor in stream(self.version)}
                assert now["weights"] == pytest.approx(sums)

    def generate(self) -> None:
        count, length = self.luck.randint(1, 24), self.luck.choice((8, 60, 200))
        asked = prompts(count)
        finished: list[int] = []
        self.made.on_progress = finished.append
        future = self.made.submit(asked, params(length)) if self.lag else self.in_thread(asked, length)
        time.sleep(self.luck.choice((0, 0.05, 0.2)))
        self.trouble(self.luck.randint(0, 2), ["answers", "process"])
        if self.luck.random() < 0.3:
            self.kill_all()
        if self.lag and self.luck.random() < 0.7:
            self.trouble(self.luck.randint(0, 2), ["calls", "process"])
            self.update()
        rollouts = self.result(future)
        assert len(finished) == count, "each sample is answered once"
        self.check_servers()
        if self.lag:
            self.check_spans(rollouts, asked, length)
        else:
            assert_whole(rollouts, asked, length, self.version)

    def result(self, future: Future[list[Rollout]]) -> list[Rollout]:
        end = time.monotonic() + LONGEST_S
        while not future.done():
            assert time.monotonic() < end, self.made.pool.states.describe()
            if self.made.weights_lost:
                self.sync_again()
            wait([future], 0.1)
        return future.result()

    def in_thread(self, asked: list[np.ndarray], length: int) -> Future[list[Rollout]]:
        future: Future[list[Rollout]] = Future()

        def run() -> None:
            try:
                future.set_result(self.made.generate(asked, params(length)))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future

    def check_spans(self, rollouts: list[Rollout], asked: list[np.ndarray], length: int) -> None:
        for rollout, prompt in zip(rollouts, asked, strict=True):
            assert rollout.token_ids.tolist() == np.resize(prompt, length).tolist()
            spans = rollout.version_spans or ((0, rollout.weight_version),)
            versions = [version for _, version in spans]
            assert versions == sorted(set(versions)) and spans[0][0] == 0
            assert versions[0] == rollout.weight_version >= self.version - self.lag and versions[-1] <= self.version


def play(folder: Path, seed: int, sync: str, lag: int, colocated: bool = False, num_rounds: int = 3) -> Chaos:
    """Play rounds of generation and updates, then close the engine, with all servers healthy again or with some failing."""
    luck, threads = random.Random(seed), set(threading.enumerate())
    python = fake_python(folder, tokens_per_s=luck.choice((400, 2000)), start_s=luck.choice((0, 1)))
    delta, sync = sync == "changes", sync.replace("changes", "tensor")
    way = dict(sync=sync, delta=delta, colocated=colocated)
    options = dict(max_lag=lag, python=python, num_servers=3, **way, **TIMEOUTS)
    options["max_in_flight"] = luck.choice((3, 1024))
    if sync == "distributed":
        options["servers_per_group"] = luck.choice((1, 2, None))
    with engine(folder, **options) as made:
        bucket_a_tensor(made)
        chaos = Chaos(made, luck, sync, lag, colocated)
        chaos.update()
        for _ in range(num_rounds):
            chaos.generate()
            chaos.release()
            chaos.trouble(luck.randint(0, 2), ["calls", "calls", "process"])
            chaos.update()
        if luck.random() < 0.5:
            recover(chaos)
        else:
            chaos.trouble(luck.randint(1, 3), ["process"])
            time.sleep(luck.choice((0, 0.5, 3)))
        counts = made.metrics()
        never = ["unknown_version", "mixed_versions", *(["stale_version"] if not lag else [])]
        wrong = sum(counts[f"rollout/dropped_{reason}"] for reason in never)
        assert wrong <= chaos.num_lies, "a server has served other weights than it should"
        started_here = processes(made)
        pids = {process.pid for process in started_here}
        started = time.monotonic()
        made.close()
        assert time.monotonic() - started < LONGEST_S / 3
        pids |= {process.pid for process in started_here}
    wait_for(lambda: not any(map(alive, pids)), 15, lambda: f"alive: {list(filter(alive, pids))}")
    wait_for(lambda: set(threading.enumerate()) <= threads, 15, lambda: set(threading.enumerate()) - threads)
    assert not list(Path("/dev/shm").glob(f"torch_{os.getpid()}_*"))
    assert {path.name for path in folder.iterdir()} == {python.name, "servers"}
    return chaos


def recover(chaos: Chaos) -> None:
    """Wait until every server serves: by itself if weights are kept, else after an update."""
    made = chaos.made

    def all_serve() -> bool:
        found = set(states(made))
        if found == {"serving", "waiting"}:
            chaos.release()
            chaos.update()
        return found == {"serving"}

    wait_for(all_serve, LONGEST_S, made.pool.states.describe)
    chaos.check_servers()


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch):
    monkeypatch.setattr(requests, "_LONGEST_BACKOFF_S", 0.3)


@pytest.mark.parametrize(
    ("sync", "lag", "colocated"),
    [("disk", 2, False), ("distributed", 0, False), ("tensor", 0, True), ("changes", 2, False)],
)
def test_whatever_fails_answers_are_whole_and_of_the_right_weights_and_nothing_is_left_behind(
    tmp_path, sync, lag, colocated
):
    play(tmp_path, 2, sync, lag, colocated, num_rounds=1)
