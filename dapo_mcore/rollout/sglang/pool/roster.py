"""Who of the servers serves, who is out and for how long; and a line on the screen when that changes.

Change here: what people are told about a server. When its state changes is pool.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Literal

from dapo_mcore.rollout.sglang.pool.server import Member, State

AWAY: tuple[State, ...] = ("out", "down")
"""Not serving, and perhaps on the way back."""


class Roster:
    """The members of a fleet. `tell` shows a line."""

    def __init__(self, members: Sequence[Member], tell: Callable[[str], None]):
        self.members, self._tell = list(members), tell
        self._out_since: dict[Member, float] = {}
        self._told: dict[Member, Literal["out", "ready"]] = {}

    def of(self, *states: State) -> list[Member]:
        """Those in one of these states."""
        return [member for member in self.members if member.state in states]

    def leave(self, member: Member, problem: str, place: str | None = None) -> None:
        """Mark the server out for `problem`, at `place` (see Member). Tell it once, however often it fails on its way back."""
        member.state, member.problem, member.place = "out", problem, place
        member.strikes += 1
        self._out_since.setdefault(member, time.monotonic())
        if self._told.get(member) != "out":
            self._told[member] = "out"
            self._say(member, f"is out: {problem.removeprefix(member.api.url).lstrip(' :')}")

    def restarting(self, member: Member, place: str, restarts_left: int, words: str) -> None:
        """Tell that the server is started again: after what, how often that may still happen, and what it last wrote."""
        after = f" after it failed at: {place}" if place else ""
        self._say(member, f"is started again{after} ({restarts_left} more restarts allowed); it last wrote: {words}")

    def ready(self, member: Member) -> None:
        """Is well again, without the current weights."""
        member.state, self._told[member] = "waiting", "ready"
        self._say(member, "is well again, and waits for the next weight sync")

    def serve(self, member: Member) -> None:
        """Holds the current weights and generates."""
        member.state = "serving"
        since = self._out_since.pop(member, None)
        if self._told.pop(member, None) is not None:
            self._say(member, f"serves again after {time.monotonic() - since:.0f} s")

    def lose(self, member: Member) -> None:
        """Never comes back."""
        member.state = "lost"
        self._say(member, f"is lost for this run: {member.problem}")

    def describe(self) -> str:
        """Why none serves, for an error message."""
        told = "; ".join(f"{m.api.url} {m.state}: {m.problem or 'no weights yet'}" for m in self.members)
        well = len(self.of("waiting"))
        lacking = f"; well, and only without the weights: {well} (another update brings them)" if well else ""
        return f"none of {len(self.members)} rollout servers can serve the current weights: {told}{lacking}"

    def _say(self, member: Member, what: str) -> None:
        # a screen that is gone (rich leaves by SystemExit then) costs a line; raised, it would end the servers' event loop
        with suppress(Exception, SystemExit):
            self._tell(f"rollout server {member.api.url} {what}")
