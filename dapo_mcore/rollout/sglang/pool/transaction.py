"""Steps that the servers of a fleet take together: a weight update, or giving up memory.

Change here: what becomes of a member that fails a step. It leaves and is taken out; the others go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from dapo_mcore.errors import RolloutError
from dapo_mcore.rollout.sglang.pool.server import Member


class Transaction:
    """The members that are still in it, and the weights they are to have (None where it is not about weights).

    take_out  is told of a member that leaves, with the reason and the place.
    """

    def __init__(
        self, members: list[Member], tag: str | None, timeout_s: float, take_out: Callable[[Member, str, str], None]
    ):
        self.members, self.tag = members, tag
        self._timeout_s, self._take_out = timeout_s, take_out

    async def each(self, step: str, action: Callable[[Member], Awaitable[None]]) -> None:
        """Does one step on every remaining member at once."""
        await self.parts(step, {(member,): action(member) for member in self.members})

    async def parts(self, step: str, works: Mapping[tuple[Member, ...], Awaitable[None]]) -> None:
        """Does a step's `works` at once, each for several members, which fail together."""
        limited = (asyncio.wait_for(work, self._timeout_s) for work in works.values())
        outcomes = await asyncio.gather(*limited, return_exceptions=True)
        place = f"weight update, {step}"
        for part, outcome in zip(works, outcomes):
            if not isinstance(outcome, BaseException):
                for member in part:
                    member.passed(place)
                continue
            if not isinstance(outcome, RolloutError | TimeoutError):
                raise outcome
            told = str(outcome) or f"nothing within {self._timeout_s:g} s"
            for member in part:
                self.members.remove(member)
                self._take_out(member, f"{place}: {told}", place)
