"""Who of the servers serves, who is out and for how long; and a line on the screen when that changes.

Change here: what people are told about a server. When its state changes is fleet.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from dapo_mcore.rollout.sglang.member import Member, State

AWAY: tuple[State, ...] = ("out", "down")
"""Not serving, and perhaps on the way back."""


class Roster:
    """The members of a fleet. `tell` shows a line."""

    def __init__(self, members: Sequence[Member], tell: Callable[[str], None]):
        self.members, self._tell = list(members), tell
        self._out_since: dict[Member, float] = {}

    def of(self, *states: State) -> list[Member]:
        """Those in one of these states."""
        return [member for member in self.members if member.state in states]

    def leave(self, member: Member, problem: str) -> None:
        """Is out, for this reason; told once, however often it fails on its way back."""
        member.state, member.problem = "out", problem
        member.strikes += 1
        if member not in self._out_since:
            self._out_since[member] = time.monotonic()
            self._tell(f"rollout server {member.api.url} is out: {problem.removeprefix(member.api.url)}")

    def wait(self, member: Member) -> None:
        """Is well again, without the current weights."""
        member.state = "waiting"
        self._tell(f"rollout server {member.api.url} is well again, and waits for the next weight sync")

    def serve(self, member: Member) -> None:
        """Holds the current weights and generates."""
        member.state = "serving"
        if (since := self._out_since.pop(member, None)) is not None:
            self._tell(f"rollout server {member.api.url} serves again after {time.monotonic() - since:.0f} s")

    def lose(self, member: Member) -> None:
        """Never comes back."""
        member.state = "lost"
        self._tell(f"rollout server {member.api.url} is lost for this run: {member.problem}")

    def describe(self) -> str:
        """Why none serves, for an error message."""
        told = "; ".join(f"{m.api.url} {m.state}: {m.problem or 'no weights yet'}" for m in self.members)
        well = len(self.of("waiting"))
        only = f"; {well} of them only lack the weights, which another update brings" if well else ""
        return f"none of {len(self.members)} rollout servers can serve the current weights: {told}{only}"
