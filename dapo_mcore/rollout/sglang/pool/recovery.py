"""How a failing server is found and taken out, and how it comes back: by itself, or restarted; or is given up.

Change here: what a server may cost before it is lost, and what it must show before it serves again.

    serving → suspected → out → healthy, or down until it is restarted → weights reloaded → serving
                                     └ restart budget spent → lost          └ weights not kept → waiting for an update

In the trainer's turn (PoolWeights.awake unset) no server starts, and one that is out is stopped: the memory is the trainer's.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

from dapo_mcore.errors import ConfigError, RolloutError
from dapo_mcore.rollout.sglang.pool.server import (
    GENERATING,
    RETURNING,
    PoolSettings,
    Server,
    ServerStates,
    wait_until_healthy,
)
from dapo_mcore.rollout.sglang.pool.update import Checksums, PoolWeights

Reload = Callable[[Server, str], Awaitable[None]]
"""Gives one server the weights of a weight_version from where they are kept."""
_NUM_FAILURES = 3
"""A server that has failed this often is restarted though it looks healthy. One that the run has not started is lost."""
_NUM_RESTARTS = 3
"""After as many restarts in a row for failures at the same step, another one would not help."""


class Recovery:
    """Takes servers out and brings them back. Lives in the pool's event loop.

    reload  None if the weights are not kept: then a server that was out serves from the next update on.
    counts  gets the numbers of servers suspected, excluded, resynced and restarted.
    """

    def __init__(
        self,
        states: ServerStates,
        weights: PoolWeights,
        settings: PoolSettings,
        counts: Counter[str],
        *,
        reload: Reload | None = None,
        checksums: Checksums | None = None,
    ):
        self.reload = reload
        self._states, self._weights, self._settings, self._counts = states, weights, settings, counts
        self._checksums, self._restarts_left = checksums, settings.restart_budget
        self._tasks: set[asyncio.Task[None]] = set()

    def suspect(self, server: Server, problem: str, reload: bool = False) -> None:
        """Take a serving server out and start its way back. `reload` says that its weights are wrong."""
        if server.state != "serving":
            return
        if reload:
            server.doubt_weights()
            server.cancel_calls()
        self._states.take_out(server, problem, GENERATING)
        self._counts["servers_suspected"] += 1
        self._spawn(self._bring_back(server))

    def take_out(self, server: Server, problem: str, failed_at: str | None = None) -> None:
        """Take out a server whose weights are in doubt. `failed_at` as in Server.

        Its requests are given up before it continues: it would go on with them under half an update.
        """
        server.cancel_calls()
        is_returning = server.state in RETURNING
        server.doubt_weights()
        self._states.take_out(server, problem, failed_at)
        self._counts["servers_excluded"] += 1
        if not is_returning:
            self._spawn(self._bring_back(server))

    async def stop(self, server: Server, forgiven: bool = True) -> None:
        """Stop a server that is out, so that it holds no memory. If `forgiven`, its next start costs no restart."""
        async with server.process_lock:
            if server.process is not None and await server.is_alive():
                self._restarts_left += forgiven
                await asyncio.to_thread(server.process.stop)

    async def close(self) -> None:
        """Leave all servers as they are, whether out or on their way back."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _bring_back(self, server: Server) -> None:
        """Wait until the server is healthy or restart it, give it the weights and let it serve; or give it up."""
        weights = self._weights
        async with weights.lock:  # a server suspected during an update must not continue before the update ends
            if server.state == "serving":
                return
        try:
            if not weights.awake.is_set():
                await self.stop(server)
                await weights.awake.wait()
            if await self._revive(server):
                await self._give_weights(server)
            else:
                self._states.mark_lost(server)
        except (RolloutError, ConfigError, TimeoutError) as error:
            late = f"it had not taken its weights again within {self._settings.step_timeout_s:g} s"
            self.take_out(server, str(error) or late, "coming back" if weights.awake.is_set() else None)
            self._spawn(self._bring_back(server))
        except Exception as error:  # nobody awaits this task, so those who wait for the server must learn of the error
            server.problem = repr(error)
            self._states.mark_lost(server)
        finally:
            await self._states.announce()

    async def _revive(self, server: Server) -> bool:
        """Return True once the server can generate, or False if it never will: `server.problem` then says why."""
        with suppress(RolloutError, TimeoutError):  # a paused server looks dead to a health check
            await asyncio.wait_for(server.client.continue_generation(), self._settings.health_timeout_s)
        await asyncio.sleep(max(server.num_failures - 1, 0))
        if server.process is None:
            return await self._wait_for_given(server)
        may_be_well = server.num_failures < _NUM_FAILURES and await server.is_alive()
        if may_be_well and await server.client.health(self._settings.health_timeout_s):
            return True
        await self._mark_down(server)
        return await self._restart(server)

    async def _restart(self, server: Server) -> bool:
        """Return True once the restarted server can generate, or False if it is given up."""
        last_words = await server.last_words()
        failed_at, num_restarts = server.count_restart()
        if reason := self._why_hopeless(failed_at, num_restarts):
            server.problem += f"; {reason}; it last wrote: {last_words}"
            await asyncio.to_thread(server.process.stop)
            return False
        async with server.process_lock:
            if not self._weights.awake.is_set():
                raise RolloutError("the trainer has taken the devices")
            self._restarts_left -= 1
            self._counts["server_restarts"] += 1
            self._states.show_restart(server, failed_at, self._restarts_left, last_words)
            server.doubt_weights()
            server.num_failures, server.released = 0, frozenset()
            await asyncio.to_thread(server.process.restart)
            server.client.url = server.process.url
        await wait_until_healthy(server, self._settings.start_timeout_s)
        return True

    def _why_hopeless(self, failed_at: str, num_restarts: int) -> str:
        """Return why the server is not restarted, or an empty text if it is."""
        if num_restarts >= _NUM_RESTARTS:
            return f"it has failed {num_restarts} times in a row at the same place ({failed_at}), so it is not started again"
        if not self._restarts_left:
            return f"all {self._settings.restart_budget} restarts (rollout.sglang.restart_budget) are spent"
        return ""

    async def _wait_for_given(self, server: Server) -> bool:
        """Wait for a server that the run has not started, as long as one of ours may take to start.

        Return False if it does not come back, or has failed too often.
        """
        if server.num_failures > _NUM_FAILURES:
            return False
        end = time.monotonic() + self._settings.start_timeout_s
        while not await server.client.health(self._settings.health_timeout_s):
            await self._mark_down(server)
            if time.monotonic() > end:
                return False
            await asyncio.sleep(self._settings.health_interval_s)
        return True

    async def _mark_down(self, server: Server) -> None:
        server.state = "down"
        server.cancel_calls()
        await self._states.announce()

    async def _give_weights(self, server: Server) -> None:
        """Let a healthy server serve if it has the current weights or can reload them; else it waits for an update."""
        weights = self._weights
        async with weights.lock:
            held = server.weight_version
            if held is not None and held != await server.client.weight_version():
                server.doubt_weights()  # its owner has restarted it
            if server.weight_version is not None and server.weight_version == weights.version:
                self._serve(server)
            elif self.reload is not None and weights.version is not None:
                server.weight_version = None
                await asyncio.wait_for(self._reload(server, weights.version), self._settings.step_timeout_s)
                self._serve(server)
                self._counts["servers_resynced"] += 1
            else:
                self._states.mark_waiting(server)

    async def _reload(self, server: Server, weight_version: str) -> None:
        await server.client.pause_generation()
        await self.reload(server, weight_version)
        await self._weights.confirm(server)
        if self._checksums is not None:
            await self._checksums.check_reloaded(server)
        await server.client.continue_generation()

    def _serve(self, server: Server) -> None:
        self._weights.assert_held(server)
        self._states.mark_serving(server)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class HealthWatch:
    """Finds servers that hang: they accept requests and never answer. Runs until it is closed.

    watched  returns the servers to check.
    suspect  takes a server out; its requests are then given up.
    """

    def __init__(
        self,
        weights: PoolWeights,
        settings: PoolSettings,
        watched: Callable[[], list[Server]],
        suspect: Callable[[Server, str], None],
    ):
        self._weights, self._settings, self._watched, self._suspect = weights, settings, watched, suspect
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        timeout_s = self._settings.health_timeout_s
        while True:
            await asyncio.sleep(self._settings.health_interval_s)
            if self._weights.updating:
                continue
            servers, num_pauses = self._watched(), self._weights.num_pauses
            answers = await asyncio.gather(*(server.client.health(timeout_s) for server in servers))
            if self._weights.num_pauses > num_pauses:
                continue  # a server that was paused meanwhile has said no
            for server, healthy in zip(servers, answers):
                if not healthy:
                    self._suspect(server, f"no sign of health within {timeout_s:g} s")
                    server.cancel_calls()
