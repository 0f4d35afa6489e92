"""What people are told of a server, and that a screen that is gone changes nothing."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from dapo_mcore.rollout.sglang.pool.roster import AWAY, Roster
from dapo_mcore.rollout.sglang.pool.server import GENERATING, Member


def member() -> Member:
    return Member(SimpleNamespace(url="http://a:1"))


def test_a_server_is_told_of_when_it_goes_and_when_it_comes_and_not_in_between():
    lines: list[str] = []
    one = member()
    roster = Roster([one], lines.append)
    roster.serve(one)
    assert lines == [], "the first time is no news"
    roster.leave(one, "http://a:1: no answer", GENERATING)
    roster.leave(one, "still none", "coming back")
    assert one.strikes == 2 and one.problem == "still none" and roster.of(*AWAY) == [one]
    assert one.place == "coming back"
    roster.restarting(one, "coming back", 2, "Killed (see server-0.log)")
    roster.ready(one)
    assert roster.of("waiting") == [one]
    roster.leave(one, "it refused the weights", "weight update, load")
    roster.ready(one)
    roster.serve(one)
    roster.leave(one, "gone", None)
    roster.lose(one)
    times = [re.sub(r"\d+ s$", "N s", line) for line in lines]
    assert times == [
        f"rollout server http://a:1 {what}"
        for what in (
            "is out: no answer",
            "is started again after it failed at: coming back (2 more restarts allowed); it last wrote: Killed (see server-0.log)",
            "is well again, and waits for the next weight sync",
            "is out: it refused the weights",
            "is well again, and waits for the next weight sync",
            "serves again after N s",
            "is out: gone",
            "is lost for this run: gone",
        )
    ]


@pytest.mark.parametrize("gone", [OSError(28, "No space left on device"), SystemExit(1)])
def test_a_screen_that_is_gone_costs_the_line_alone(gone):
    def tell(line: str) -> None:
        raise gone

    one = member()
    roster = Roster([one], tell)
    roster.leave(one, "no answer", None)
    roster.ready(one)
    roster.serve(one)
    roster.lose(one)
    assert one.state == "lost" and one.strikes == 1


def test_an_error_names_every_server_and_says_which_only_lack_the_weights():
    here, there = member(), Member(SimpleNamespace(url="http://b:2"))
    roster = Roster([here, there], lambda line: None)
    roster.leave(there, "no answer")
    assert roster.describe() == (
        "none of 2 rollout servers can serve the current weights: http://a:1 waiting: no weights yet; "
        "http://b:2 out: no answer; well, and only without the weights: 1 (another update brings them)"
    )
