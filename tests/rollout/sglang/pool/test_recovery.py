"""When a server is started again and when it is given up, on servers that are only pretended."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from dapo_mcore.errors import RolloutError
from dapo_mcore.rollout.sglang.launch.process import ServerProcess
from dapo_mcore.rollout.sglang.pool.pool import Fleet
from dapo_mcore.rollout.sglang.pool.recovery import Revival
from dapo_mcore.rollout.sglang.pool.roster import Roster
from dapo_mcore.rollout.sglang.pool.server import GENERATING, Member, Patience
from dapo_mcore.rollout.sglang.pool.transaction import Transaction

LOAD = "weight update, load"


def patience(restart_budget: int = 50) -> Patience:
    times = dict(health_interval_s=9.0, health_timeout_s=1.0, start_timeout_s=1.0, step_timeout_s=1.0)
    return Patience(max_in_flight=1, restart_budget=restart_budget, **times)


def dead_member() -> Member:
    """Its process has ended; started again it is well."""

    async def done(*_: Any) -> bool:
        return True

    process = SimpleNamespace(alive=False, url="http://a:1", restart=lambda: None, stop=lambda: None)
    process.last_words = lambda: "assert layer.k_scale > 0.0 (see server-0.log)"
    return Member(SimpleNamespace(url="http://a:1", resume=done, healthy=done), process=process)


def failing(places: list[str | None], restart_budget: int = 50) -> tuple[list[bool], Member, list[str]]:
    """Whether the member is well again after each failure, the member, and what was told."""
    lines: list[str] = []

    async def run() -> tuple[list[bool], Member]:
        member = dead_member()
        roster, awake = Roster([member], lines.append), asyncio.Event()
        awake.set()

        async def find_down(_: Member) -> None: ...

        revival = Revival(patience(restart_budget), roster, Counter(), awake, find_down)
        outcomes = []
        for place in places:
            roster.leave(member, "no answer", place)
            outcomes.append(await revival.revive(member))
        return outcomes, member

    return *asyncio.run(run()), lines


@pytest.mark.parametrize(
    ("places", "last"),
    [
        ([LOAD, LOAD, LOAD], False),
        ([LOAD, LOAD, GENERATING, LOAD], True),
        ([None, None, None], True),
    ],
)
def test_the_third_failure_in_a_row_at_one_place_is_the_last(places, last):
    outcomes, member, lines = failing(places)
    assert outcomes == [True] * (len(places) - 1) + [last]
    if not last:
        assert "failed 3 times in a row at the same place (weight update, load)" in member.problem
        assert member.problem.endswith("it last wrote: assert layer.k_scale > 0.0 (see server-0.log)")
        assert sum("is started again after it failed at: weight update, load" in line for line in lines) == 2


def test_a_spent_budget_is_told_with_the_last_words():
    outcomes, member, _ = failing([LOAD, GENERATING], restart_budget=1)
    assert outcomes == [True, False]
    assert "all 1 restarts (rollout.sglang.restart_budget) are spent; it last wrote: assert" in member.problem


def test_a_place_that_is_passed_is_forgotten():
    member = Member(SimpleNamespace(url="http://a:1"), state="serving")

    async def succeed(_: Member) -> None: ...

    async def fail(_: Member) -> None:
        raise RolloutError("no")

    async def run() -> None:
        taken_out: list[str] = []
        transaction = Transaction([member], "1", 1.0, lambda member, problem, place: taken_out.append(place))
        for step, action, left in (("open", succeed, (LOAD, 2)), ("load", succeed, ("", 0)), ("load", fail, (LOAD, 2))):
            member.falls = (LOAD, 2)
            await transaction.each(step, action)
            assert member.falls == left
        assert taken_out == [LOAD]
        member.falls = (GENERATING, 2)
        fleet = Fleet([member], patience())
        fleet._transaction("2")  # it has generated from the last update to this one
        await fleet.close()
        assert member.falls == ("", 0)

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
