"""One rollout server as the fleet sees it, and how long the fleet waits for one.

Change here: what is known about a server. What is done with it is pool.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from dapo_mcore.errors import RolloutError
from dapo_mcore.rollout.sglang.client.api import ALL_MEMORY, ServerApi
from dapo_mcore.rollout.sglang.client.versions import OLDEST, Version
from dapo_mcore.rollout.sglang.launch.process import OwnedServer

_ABORT_TIMEOUT_S = 5.0
GENERATING = "generating"
"""The place of what goes wrong between two updates."""

State = Literal["waiting", "serving", "out", "down", "lost"]
"""waiting: well, without the current weights. out: being looked at. down: found ill, restarted or waited for."""


@dataclass(eq=False)
class Member:
    """One server. `process` is None for a server that somebody else started.

    version   of SGLang.
    strikes   times it was taken out since its last good answer (behind a router: update); the third restarts it.
    calls     generation requests on their way, so that a hung server's can be given up.
    tag       the weights that it has confirmed.
    released  kinds of device memory that it has given up (server_api.ALL_MEMORY).
    changing  held while its process is stopped or started.
    link      the group in which it receives broadcasts (server_group.py).
    place     what it was doing when it was taken out, until it is started again for that; None: the reason is not its own.
    falls     at which place it was last started again for, and how often in a row.
    """

    api: ServerApi
    num_ranks: int = 1
    version: Version = OLDEST
    process: OwnedServer | None = None
    state: State = "waiting"
    strikes: int = 0
    calls: set[asyncio.Task[Any]] = field(default_factory=set)
    tag: str | None = None
    released: frozenset[str] = frozenset()
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    link: Any = None
    problem: str = ""
    place: str | None = None
    falls: tuple[str, int] = ("", 0)

    def fall(self) -> tuple[str, int]:
        """Count a restart for what went wrong at `place`; return `falls`."""
        if self.place is not None:
            self.falls = (self.place, self.falls[1] + 1 if self.falls[0] == self.place else 1)
            self.place = None
        return self.falls

    def passed(self, place: str) -> None:
        """Forget the restarts for what went wrong at `place`: this time nothing did."""
        if self.falls[0] == place:
            self.falls = ("", 0)

    async def abort(self, rid: str) -> None:
        """Ends a request, where the server still hears."""
        with suppress(RolloutError, TimeoutError):
            await asyncio.wait_for(self.api.abort(rid), _ABORT_TIMEOUT_S)

    async def release_memory(self) -> None:
        """All of it; its weights are lost."""
        self.tag, self.released = None, ALL_MEMORY
        await self.api.release_memory(ALL_MEMORY)

    async def take_memory(self, tags: frozenset[str]) -> None:
        """What it has given up of `tags`."""
        if missing := tags & self.released:
            await self.api.take_memory(missing)
            self.released -= missing

    async def is_alive(self) -> bool:
        """Whether its process runs, as far as we know; a node may take its time to tell."""
        return self.process is None or await asyncio.to_thread(lambda: self.process.alive)

    async def last_words(self) -> str:
        return await asyncio.to_thread(self.process.last_words) if self.process is not None else "it runs elsewhere"


@dataclass(frozen=True, slots=True)
class Patience:
    """Limits of the fleet, in seconds and counts; see SGLangConfig."""

    max_in_flight: int
    health_interval_s: float
    health_timeout_s: float
    start_timeout_s: float
    step_timeout_s: float
    restart_budget: int


async def _wait(server: OwnedServer) -> None: ...


async def wait_until_healthy(
    member: Member, timeout_s: float, waiting: Callable[[OwnedServer], Awaitable[None]] = _wait
) -> None:
    """Return when the server of ours generates; `waiting` is called meanwhile.

    Raises RolloutError when its process ends first, or time is up.
    """
    try:
        async with asyncio.timeout(timeout_s):
            while not await member.api.healthy(timeout_s):
                if not await member.is_alive():
                    raise RolloutError(f"{member.api.url} ended while it started: {await member.last_words()}")
                await waiting(member.process)
                await asyncio.sleep(0.2)
    except TimeoutError:
        words = await member.last_words()
        raise RolloutError(f"{member.api.url} was not up within {timeout_s:g} s: {words}") from None
