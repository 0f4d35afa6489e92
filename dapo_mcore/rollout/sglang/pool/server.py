"""One server as the pool sees it, and the states of all servers.

Change here: what is known about a server, and what people read about it. pool.py decides when a server serves, recovery.py
when it is taken out and comes back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from dapo_mcore.errors import RolloutError
from dapo_mcore.rollout.sglang.client.api import ALL_MEMORY, ServerClient
from dapo_mcore.rollout.sglang.client.versions import OLDEST, SGLangVersion
from dapo_mcore.rollout.sglang.launch.process import LaunchedServer

_ABORT_TIMEOUT_S = 5.0
GENERATING = "generating"
"""`failed_at` of a server that fails between two weight updates."""

State = Literal["waiting", "serving", "out", "down", "lost"]
"""waiting: healthy, but without the current weights. out: taken out, its health is not known yet. down: found unhealthy, and
restarted or waited for. lost: never used again."""
RETURNING: tuple[State, ...] = ("out", "down")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """Limits of the pool; see SGLangConfig.

    max_in_flight       requests that one server (or the router) holds at a time.
    health_interval_s   between two health checks; health_timeout_s limits one.
    start_timeout_s     for a start of a server, or for the return of one that the run has not started.
    step_timeout_s      for one step of a weight update on one server.
    weights_timeout_s   for a request that waits while no server has the weights and no update is under way.
    restart_budget      restarts during the run, over all servers.
    continues_requests  requests in flight continue after an update, under the new weights; else an update aborts them.
    """

    max_in_flight: int
    health_interval_s: float
    health_timeout_s: float
    start_timeout_s: float
    step_timeout_s: float
    weights_timeout_s: float
    restart_budget: int
    continues_requests: bool = False


@dataclass(eq=False)
class Server:
    """One server. `process` is None if the run has not started it.

    num_ranks        processes of the server that hold weights.
    num_failures     how often it was taken out since its last good answer (behind a router: since its last update).
    calls            generation requests in flight, so that those of a hung server can be given up.
    weight_version   the weights that it has confirmed; None while they are in doubt.
    released         tags of the device memory that it has released (api.ALL_MEMORY).
    process_lock     held while its process is stopped or started.
    broadcast_group  the group in which it receives broadcasts (sync/distributed.py).
    failed_at        what it did when it was taken out: GENERATING or a step of an update. None if it is not to blame.
    restarts         after failures at which step it was restarted last, and how often in a row.
    """

    client: ServerClient
    num_ranks: int = 1
    sglang_version: SGLangVersion = OLDEST
    process: LaunchedServer | None = None
    state: State = "waiting"
    num_failures: int = 0
    calls: set[asyncio.Task[Any]] = field(default_factory=set)
    weight_version: str | None = None
    released: frozenset[str] = frozenset()
    process_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    broadcast_group: Any = None
    problem: str = ""
    failed_at: str | None = None
    restarts: tuple[str, int] = ("", 0)

    @property
    def url(self) -> str:
        return self.client.url

    def count_restart(self) -> tuple[str, int]:
        """Count a restart after a failure at `failed_at`, and return `restarts`."""
        if self.failed_at is not None:
            step, count = self.restarts
            self.restarts = (self.failed_at, count + 1 if step == self.failed_at else 1)
            self.failed_at = None
        return self.restarts

    def forget_restarts(self, step: str) -> None:
        """Forget the restarts after failures at `step`, since it went well this time."""
        if self.restarts[0] == step:
            self.restarts = ("", 0)

    def doubt_weights(self) -> None:
        """Forget which weights and which broadcast group it has: it may have been restarted or hold half an update."""
        self.weight_version, self.broadcast_group = None, None

    def cancel_calls(self) -> None:
        """Give up its generation requests; ServerPool.call raises RequestFailed for each."""
        for task in self.calls:
            task.cancel()

    async def abort_request(self, rid: str) -> None:
        """Abort a request, if the server still answers."""
        with suppress(RolloutError, TimeoutError):
            await asyncio.wait_for(self.client.abort_request(rid), _ABORT_TIMEOUT_S)

    async def release_memory(self) -> None:
        """Release all device memory. The weights are lost."""
        self.weight_version, self.released = None, ALL_MEMORY
        await self.client.release_memory_occupation(ALL_MEMORY)

    async def resume_memory(self, tags: frozenset[str]) -> None:
        """Take back the released memory among `tags`."""
        if missing := tags & self.released:
            await self.client.resume_memory_occupation(missing)
            self.released -= missing

    async def is_alive(self) -> bool:
        """Return False if its process has ended. The process may be on a node that takes its time to answer."""
        return self.process is None or await asyncio.to_thread(lambda: self.process.alive)

    async def last_words(self) -> str:
        """Return what its process wrote last, for an error message."""
        return await asyncio.to_thread(self.process.last_words) if self.process is not None else "it runs elsewhere"


class ServerStates:
    """All servers with their states, and the lines that people read about them.

    tell     shows a line.
    changed  wakes those who wait for a state to change; `announce` notifies it.
    """

    def __init__(self, servers: Sequence[Server], tell: Callable[[str], None]):
        self.servers, self._tell = list(servers), tell
        self.changed = asyncio.Condition()
        self._out_since: dict[Server, float] = {}
        self._told: dict[Server, Literal["out", "waiting"]] = {}

    def having(self, *states: State) -> list[Server]:
        """Return the servers in one of these states."""
        return [server for server in self.servers if server.state in states]

    async def announce(self) -> None:
        """Wake everybody who waits for `changed`."""
        async with self.changed:
            self.changed.notify_all()

    def take_out(self, server: Server, problem: str, failed_at: str | None = None) -> None:
        """Mark the server out and count the failure. Show it once, however often the server fails on its way back."""
        server.state, server.problem, server.failed_at = "out", problem, failed_at
        server.num_failures += 1
        self._out_since.setdefault(server, time.monotonic())
        if self._told.get(server) != "out":
            self._told[server] = "out"
            self._say(server, f"is out: {problem.removeprefix(server.url).lstrip(' :')}")

    def show_restart(self, server: Server, failed_at: str, restarts_left: int, last_words: str) -> None:
        """Show that the server is restarted, why, how many restarts are left, and what it wrote last."""
        after = f" after it failed at: {failed_at}" if failed_at else ""
        self._say(
            server, f"is started again{after} ({restarts_left} more restarts allowed); it last wrote: {last_words}"
        )

    def mark_waiting(self, server: Server) -> None:
        """Mark the server healthy. It still needs the current weights before it may serve."""
        server.state, self._told[server] = "waiting", "waiting"
        self._say(server, "is well again, and waits for the next weight sync")

    def mark_serving(self, server: Server) -> None:
        """Mark the server as serving: it has confirmed the current weights and generates."""
        server.state = "serving"
        since = self._out_since.pop(server, None)
        if self._told.pop(server, None) is not None:
            self._say(server, f"serves again after {time.monotonic() - since:.0f} s")

    def mark_lost(self, server: Server) -> None:
        """Mark the server as lost for the rest of the run."""
        server.state = "lost"
        self._say(server, f"is lost for this run: {server.problem}")

    def describe(self) -> str:
        """Return why no server can serve, for an error message."""
        each = "; ".join(f"{s.url} {s.state}: {s.problem or 'no weights yet'}" for s in self.servers)
        num_waiting = len(self.having("waiting"))
        lacking = (
            f"; well, and only without the weights: {num_waiting} (another update brings them)" if num_waiting else ""
        )
        return f"none of {len(self.servers)} rollout servers can serve the current weights: {each}{lacking}"

    def _say(self, server: Server, what: str) -> None:
        # If the terminal is gone, rich raises SystemExit. That may cost a line, but must not end the servers' event loop.
        with suppress(Exception, SystemExit):
            self._tell(f"rollout server {server.url} {what}")


async def _do_nothing(process: LaunchedServer) -> None: ...


async def wait_until_healthy(
    server: Server, timeout_s: float, meanwhile: Callable[[LaunchedServer], Awaitable[None]] = _do_nothing
) -> None:
    """Wait until a server that the run has started can generate. `meanwhile` is called every 0.2 s.

    Raise RolloutError if its process ends, or after `timeout_s`.
    """
    try:
        async with asyncio.timeout(timeout_s):
            while not await server.client.health(timeout_s):
                if not await server.is_alive():
                    raise RolloutError(f"{server.url} ended while it started: {await server.last_words()}")
                await meanwhile(server.process)
                await asyncio.sleep(0.2)
    except TimeoutError:
        words = await server.last_words()
        raise RolloutError(f"{server.url} was not up within {timeout_s:g} s: {words}") from None
