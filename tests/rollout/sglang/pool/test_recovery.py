"""When a server is started again and when it is given up, on servers that are only pretended."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from dapo_mcore.errors import RolloutError
from dapo_mcore.rollout.sglang.launch.process import ServerProcess
from dapo_mcore.rollout.sglang.pool.recovery import Recovery
from dapo_mcore.rollout.sglang.pool.server import GENERATING, RETURNING, PoolSettings, Server, ServerStates
from dapo_mcore.rollout.sglang.pool.update import PoolWeights, Transaction, Updates

LOAD = "weight update, load"


def settings(restart_budget: int = 50) -> PoolSettings:
    times = dict(health_interval_s=9.0, health_timeout_s=1.0, start_timeout_s=1.0, step_timeout_s=1.0)
    times |= dict(weights_timeout_s=1.0)
    return PoolSettings(max_in_flight=1, restart_budget=restart_budget, **times)


def dead_server() -> Server:
    """Its process has ended; started again it is well."""

    async def done(*_: Any) -> bool:
        return True

    process = SimpleNamespace(alive=False, url="http://a:1", restart=lambda: None, stop=lambda: None)
    process.last_words = lambda: "assert layer.k_scale > 0.0 (see server-0.log)"
    client = SimpleNamespace(url="http://a:1", continue_generation=done, health=done)
    return Server(client, process=process)


def failing(steps: list[str | None], restart_budget: int = 50) -> tuple[list[bool], Server, list[str]]:
    """Whether the server is well again after each failure, the server, and what was told."""
    lines: list[str] = []

    async def run() -> tuple[list[bool], Server]:
        server = dead_server()
        states = ServerStates([server], lines.append)
        recovery = Recovery(states, PoolWeights(), settings(restart_budget), Counter())
        outcomes = []
        for step in steps:
            recovery.take_out(server, "no answer", step)
            async with states.changed:
                await states.changed.wait_for(lambda: server.state not in RETURNING)
            outcomes.append(server.state == "waiting")
        return outcomes, server

    return *asyncio.run(run()), lines


@pytest.mark.parametrize(
    ("steps", "last"),
    [
        ([LOAD, LOAD, LOAD], False),
        ([LOAD, LOAD, GENERATING, LOAD], True),
        ([None, None, None], True),
    ],
)
def test_the_third_failure_in_a_row_at_one_place_is_the_last(steps, last):
    outcomes, server, lines = failing(steps)
    assert outcomes == [True] * (len(steps) - 1) + [last]
    if not last:
        assert "failed 3 times in a row at the same place (weight update, load)" in server.problem
        assert server.problem.endswith("it last wrote: assert layer.k_scale > 0.0 (see server-0.log)")
        assert sum("is started again after it failed at: weight update, load" in line for line in lines) == 2


def test_a_spent_budget_is_told_with_the_last_words():
    outcomes, server, _ = failing([LOAD, GENERATING], restart_budget=1)
    assert outcomes == [True, False]
    assert "all 1 restarts (rollout.sglang.restart_budget) are spent; it last wrote: assert" in server.problem


def test_a_place_that_is_passed_is_forgotten():
    server = Server(SimpleNamespace(url="http://a:1"), state="serving")

    async def succeed(_: Server) -> None: ...

    async def fail(_: Server) -> None:
        raise RolloutError("no")

    async def run() -> None:
        taken_out: list[str] = []
        recovery = SimpleNamespace(take_out=lambda server, problem, failed_at: taken_out.append(failed_at))
        transaction = Transaction([server], "1", 1.0, recovery)
        for step, action, left in (("open", succeed, (LOAD, 2)), ("load", succeed, ("", 0)), ("load", fail, (LOAD, 2))):
            server.restarts = (LOAD, 2)
            await transaction.each(step, action)
            assert server.restarts == left
        assert taken_out == [LOAD]
        server.restarts = (GENERATING, 2)
        updates = Updates(ServerStates([server], print), PoolWeights(), settings(), recovery, None)
        updates.transaction("2")  # the server has generated from the last update to this one
        assert server.restarts == ("", 0)

    asyncio.run(run())


def test_the_last_words_are_the_last_error_since_the_start(tmp_path):
    """A server's other processes go on writing after the one that failed."""
    process = ServerProcess(["true"], {}, tmp_path, "server-0", "http://a:1", SimpleNamespace())
    log = tmp_path / "server-0.log"
    log.write_text("ValueError: of the start before\n")
    process.start()
    process.stop()
    assert process.last_words() == f"it wrote nothing (see {log})" and process.last_line() == ""
    with log.open("a") as file:
        file.write("Traceback\n  File x\n    assert layer.k_scale > 0.0\nAssertionError\n" + "Bye\n" * 9)
    assert process.last_words() == f"File x | assert layer.k_scale > 0.0 | AssertionError (see {log})"
    assert process.last_line() == "Bye"
