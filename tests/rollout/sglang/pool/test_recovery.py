"""When a server is restarted and when it is given up. The servers are stand-ins."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from dapo_mcore.rollout.sglang.pool.recovery import Recovery
from dapo_mcore.rollout.sglang.pool.server import GENERATING, RETURNING, Server, ServerStates
from dapo_mcore.rollout.sglang.pool.update import PoolWeights
from tests.rollout.sglang.serving import pool_settings

LOAD = "weight update, load"


def dead_server() -> Server:
    """Return a server whose process has ended. After a restart it is healthy."""

    async def done(*_: Any) -> bool:
        return True

    process = SimpleNamespace(alive=False, url="http://a:1", restart=lambda: None, stop=lambda: None)
    process.last_words = lambda: "assert layer.k_scale > 0.0 (see server-0.log)"
    client = SimpleNamespace(url="http://a:1", continue_generation=done, health=done)
    return Server(client, process=process)


def failing(steps: list[str | None], restart_budget: int = 50) -> tuple[list[bool], Server, list[str]]:
    """Return whether the server was healthy again after each failure, the server, and the lines shown."""
    lines: list[str] = []

    async def run() -> tuple[list[bool], Server]:
        server = dead_server()
        states = ServerStates([server], lines.append)
        recovery = Recovery(states, PoolWeights(), pool_settings(restart_budget=restart_budget), Counter())
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
def test_a_server_is_given_up_at_the_third_failure_in_a_row_at_one_step(steps, last):
    outcomes, server, lines = failing(steps)
    assert outcomes == [True] * (len(steps) - 1) + [last]
    if not last:
        assert "failed 3 times in a row at the same place (weight update, load)" in server.problem
        assert server.problem.endswith("it last wrote: assert layer.k_scale > 0.0 (see server-0.log)")
        assert sum("is started again after it failed at: weight update, load" in line for line in lines) == 2


def test_the_problem_of_a_spent_budget_has_the_last_words():
    outcomes, server, _ = failing([LOAD, GENERATING], restart_budget=1)
    assert outcomes == [True, False]
    assert "all 1 restarts (rollout.sglang.restart_budget) are spent; it last wrote: assert" in server.problem
