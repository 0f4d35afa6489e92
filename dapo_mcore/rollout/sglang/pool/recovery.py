"""How a server that is out becomes well again: by itself, or started anew; and when it is given up.

Change here: what a server may cost before it is lost. When one is taken out, and how it gets its weights, is pool.py.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress

from dapo_mcore.errors import RolloutError
from dapo_mcore.rollout.sglang.pool.roster import Roster
from dapo_mcore.rollout.sglang.pool.server import Member, Patience, wait_until_healthy

_STRIKES = 3
_FALLS = 3
"""As many restarts for what went wrong at one place, in a row, show that another one would not help."""


class Revival:
    """Lives in the fleet's event loop.

    awake      unset while the trainer has the devices: nothing starts.
    find_down  is told of a member that does not answer, before it is waited for or started again.
    """

    def __init__(
        self,
        patience: Patience,
        roster: Roster,
        counts: Counter[str],
        awake: asyncio.Event,
        find_down: Callable[[Member], Awaitable[None]],
    ):
        self._patience, self._restarts_left = patience, patience.restart_budget
        self._roster, self._counts, self._awake, self._find_down = roster, counts, awake, find_down

    async def revive(self, member: Member) -> bool:
        """True once the server generates; False when it never will again, for a reason that `member.problem` then tells."""
        with suppress(RolloutError, TimeoutError):  # a paused server looks dead to a health check
            await asyncio.wait_for(member.api.resume(), self._patience.health_timeout_s)
        await asyncio.sleep(max(member.strikes - 1, 0))
        if member.process is None:
            return await self._wait_for_given(member)
        good = member.strikes < _STRIKES and await member.is_alive()
        if good and await member.api.healthy(self._patience.health_timeout_s):
            return True
        await self._find_down(member)
        return await self._restart(member)

    async def stop(self, member: Member, forgiven: bool = True) -> None:
        """Ends a server that is out, so that it holds no memory; starting it again is not counted where it is forgiven."""
        async with member.changing:
            if member.process is not None and await member.is_alive():
                self._restarts_left += forgiven
                await asyncio.to_thread(member.process.stop)

    async def _restart(self, member: Member) -> bool:
        """True once the server generates; False when it is given up."""
        words = await member.last_words()
        place, falls = member.fall()
        if reason := self._hopeless(place, falls):
            member.problem += f"; {reason}; it last wrote: {words}"
            await asyncio.to_thread(member.process.stop)
            return False
        async with member.changing:
            if not self._awake.is_set():
                raise RolloutError("the trainer has taken the devices")
            self._restarts_left -= 1
            self._counts["server_restarts"] += 1
            self._roster.restarting(member, place, self._restarts_left, words)
            member.tag, member.link, member.strikes, member.released = None, None, 0, frozenset()
            await asyncio.to_thread(member.process.restart)
            member.api.url = member.process.url
        await wait_until_healthy(member, self._patience.start_timeout_s)
        return True

    def _hopeless(self, place: str, falls: int) -> str:
        """Why no restart is left for a server, or nothing."""
        if falls >= _FALLS:
            return f"it has failed {falls} times in a row at the same place ({place}), so it is not started again"
        if not self._restarts_left:
            return f"all {self._patience.restart_budget} restarts (rollout.sglang.restart_budget) are spent"
        return ""

    async def _wait_for_given(self, member: Member) -> bool:
        """A server of somebody else's gets as long to come back as one of ours to start, and three tries to be of use."""
        if member.strikes > _STRIKES:
            return False
        end = time.monotonic() + self._patience.start_timeout_s
        while not await member.api.healthy(self._patience.health_timeout_s):
            await self._find_down(member)
            if time.monotonic() > end:
                return False
            await asyncio.sleep(self._patience.health_interval_s)
        return True
