"""The servers of a run as one pool: which server generates a request, and the entry to weight updates and turns.

Change here: how requests are spread, and how long they wait. The rule of the whole folder: a server is `serving` only while
it has confirmed that it holds the current weights.

    update.py     weight updates and turns, in steps that all servers take together
    recovery.py   how a failing server is found, taken out and brought back
    server.py     what is known about one server, and the states of all
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

from dapo_mcore.errors import RolloutError
from dapo_mcore.rollout.sglang.client.http import RequestFailed
from dapo_mcore.rollout.sglang.pool.recovery import HealthWatch, Recovery, Reload
from dapo_mcore.rollout.sglang.pool.server import RETURNING, PoolSettings, Server, ServerStates
from dapo_mcore.rollout.sglang.pool.update import Checksums, PoolWeights, Transaction, Updates


class ServerPool:
    """All servers of a run. Use it inside one event loop.

    router     generates instead of the servers, which then only take weights. It may use a server that is out; the
               weight_version in the answer tells.
    reload     gives one server the weights of an update from where they are kept; None if they are not kept.
    checksums  compares the weights of servers after an update; None compares nothing.
    tell       shows a line about a server that is out, or back.

    `counts` has the numbers of servers suspected, excluded, resynced and restarted. `states` knows every server's state.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        settings: PoolSettings,
        *,
        router: Server | None = None,
        reload: Reload | None = None,
        checksums: Checksums | None = None,
        tell: Callable[[str], None] = lambda line: None,
    ):
        self.counts: Counter[str] = Counter()
        self.checksums = checksums
        self._settings, self._router = settings, router
        self.states, self._weights = ServerStates(servers, tell), PoolWeights()
        self._recovery = Recovery(self.states, self._weights, settings, self.counts, reload=reload, checksums=checksums)
        self._updates = Updates(self.states, self._weights, settings, self._recovery, checksums)
        self._health = HealthWatch(self._weights, settings, self._watched, self.suspect)

    @property
    def servers(self) -> list[Server]:
        return self.states.servers

    @property
    def serving(self) -> list[Server]:
        return self.states.having("serving")

    @property
    def weight_version(self) -> str | None:
        """The weight_version that a server must hold to serve; None before the first update."""
        return self._weights.version

    @property
    def weights_lost(self) -> bool:
        """True if no server serves, but some are healthy and only lack the weights: another update makes them serve."""
        expected = self._weights.awake.is_set() and self.weight_version is not None
        return expected and not self.serving and bool(self.states.having("waiting")) and not self.states.having("out")

    async def acquire(self, avoid: Server | None = None) -> Server:
        """Return the serving server with the fewest requests, once one has room; `avoid` only if it is the only one.

        If no server serves, wait for those on their way back. If servers only lack the weights, wait for an update, up to
        weights_timeout_s after the last change. Raise RolloutError then, and if no server is left.
        """
        async with self.states.changed:
            while True:
                free = [s for s in self._generators() if len(s.calls) < self._settings.max_in_flight]
                if free:
                    return min(free, key=lambda s: (s is avoid, len(s.calls)))
                await self._wait_for_change()

    async def call(self, server: Server, request: Coroutine[Any, Any, Any]) -> Any:
        """Await a generation request. Raise RequestFailed if the server is taken out for good meanwhile."""
        task = asyncio.create_task(request)
        server.calls.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():
                task.cancel()
                raise
            raise RequestFailed(f"{server.url} was given up: {server.problem}") from None
        finally:
            server.calls.discard(task)
            async with self.states.changed:
                self.states.changed.notify()

    async def abort_request(self, server: Server, rid: str) -> None:
        """Abort a request. The router's may be on any server.

        A server notices a closed connection by itself, but only seconds later.
        """
        await asyncio.gather(*(s.abort_request(rid) for s in (self.servers if server is self._router else [server])))

    def suspect(self, server: Server, problem: str, reload: bool = False) -> None:
        """Take a serving server out and start its way back. `reload` says that its weights are wrong.

        The router is never taken out, since nothing else could be asked.
        """
        if server is self._router:
            server.problem = problem
        else:
            self._recovery.suspect(server, problem, reload)

    @asynccontextmanager
    async def update(self, weight_version: str, num_broken: int = 0) -> AsyncIterator[Transaction]:
        """Move the servers to new weights, which the block gives to the transaction's servers; see Updates.update."""
        async with self._updates.update(weight_version, num_broken) as transaction:
            yield transaction
        if self._router is not None:  # its answers do not tell which of the servers work
            for server in transaction.servers:
                server.num_failures = 0

    async def release(self) -> None:
        """Make every server release its device memory; see Updates.release."""
        await self._updates.release()

    async def resume(self) -> None:
        """Let the servers take their memory back and serve; see Updates.resume."""
        await self._updates.resume()

    async def close(self) -> None:
        """End the pool's own tasks. The servers go on."""
        await self._health.close()
        await self._recovery.close()

    def _generators(self) -> list[Server]:
        return [self._router] if self._router is not None and self.serving else self.serving

    def _watched(self) -> list[Server]:
        return self.serving + ([self._router] if self._router is not None else [])

    async def _wait_for_change(self) -> None:
        """Wait, inside `changed`, until a state changes. Raise RolloutError if no server can serve in time."""
        if self.serving or self.states.having(*RETURNING):
            timeout_s = None
        elif self.states.having("waiting"):
            timeout_s = self._settings.weights_timeout_s
        else:
            raise RolloutError(self.states.describe())
        changed = self.states.changed
        try:
            async with asyncio.timeout(timeout_s):
                await changed.wait()
        except TimeoutError:
            if not self._weights.updating:
                raise RolloutError(
                    f"{self.states.describe()}, and none came within {timeout_s:g} s (rollout.sglang.request_timeout_s)"
                ) from None
        except asyncio.CancelledError:
            changed.notify()  # this task may hold the wake-up of another one, which Condition loses before Python 3.13
            raise
