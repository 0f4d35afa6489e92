"""The lines and errors about servers, also when the terminal is gone."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from dapo_mcore.rollout.sglang.pool.server import GENERATING, RETURNING, Server, ServerStates


def server() -> Server:
    return Server(SimpleNamespace(url="http://a:1"))


def test_a_line_is_shown_when_a_server_goes_out_and_when_it_returns_and_not_in_between():
    lines: list[str] = []
    one = server()
    states = ServerStates([one], lines.append)
    states.mark_serving(one)
    assert lines == [], "nothing is shown the first time"
    states.take_out(one, "http://a:1: no answer", GENERATING)
    states.take_out(one, "still none", "coming back")
    assert one.num_failures == 2 and one.problem == "still none" and states.having(*RETURNING) == [one]
    assert one.failed_at == "coming back"
    states.show_restart(one, "coming back", 2, "Killed (see server-0.log)")
    states.mark_waiting(one)
    assert states.having("waiting") == [one]
    states.take_out(one, "it refused the weights", "weight update, load")
    states.mark_waiting(one)
    states.mark_serving(one)
    states.take_out(one, "gone", None)
    states.mark_lost(one)
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
def test_without_a_terminal_only_the_line_is_lost(gone):
    def tell(line: str) -> None:
        raise gone

    one = server()
    states = ServerStates([one], tell)
    states.take_out(one, "no answer", None)
    states.mark_waiting(one)
    states.mark_serving(one)
    states.mark_lost(one)
    assert one.state == "lost" and one.num_failures == 1


def test_describe_names_every_server_and_counts_those_that_only_lack_the_weights():
    here, there = server(), Server(SimpleNamespace(url="http://b:2"))
    states = ServerStates([here, there], lambda line: None)
    states.take_out(there, "no answer")
    assert states.describe() == (
        "none of 2 rollout servers can serve the current weights: http://a:1 waiting: no weights yet; "
        "http://b:2 out: no answer; well, and only without the weights: 1 (another update brings them)"
    )
