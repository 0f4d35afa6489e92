"""One rollout server as the fleet sees it, and how long the fleet waits for one.

Change here: what is known about a server. What is done with it is fleet.py.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, Literal

from dapo_mcore.errors import RolloutError
from dapo_mcore.rollout.server_api import ServerApi
from dapo_mcore.rollout.servers import ServerProcess

State = Literal["waiting", "serving", "out", "lost"]


@dataclass(eq=False)
class Member:
    """One server. `process` is None for a server that somebody else started.

    strikes   times it was taken out since its last good answer; the third restarts it.
    calls     generation requests on their way, so that a hung server's can be given up.
    tag       the weights that it has confirmed.
    link      what a distributed update keeps for it (transfer.py).
    """

    api: ServerApi
    num_ranks: int = 1
    process: ServerProcess | None = None
    state: State = "waiting"
    strikes: int = 0
    calls: set[asyncio.Task[Any]] = field(default_factory=set)
    tag: str | None = None
    link: Any = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Patience:
    """Limits of the fleet, in seconds and counts; see SGLangConfig."""

    max_in_flight: int
    health_interval_s: float
    health_timeout_s: float
    start_timeout_s: float
    step_timeout_s: float
    restart_budget: int


async def wait_until_healthy(member: Member, timeout_s: float) -> None:
    """Returns when the server generates. Raises RolloutError when its process ends first, or time is up."""
    try:
        async with asyncio.timeout(timeout_s):
            while not await member.api.healthy(timeout_s):
                if member.process is not None and not member.process.alive:
                    raise RolloutError(f"{member.api.url} ended while it started: {member.process.last_words()}")
                await asyncio.sleep(0.2)
    except TimeoutError:
        words = member.process.last_words() if member.process is not None else "it runs elsewhere"
        raise RolloutError(f"{member.api.url} was not up within {timeout_s:g} s: {words}") from None
