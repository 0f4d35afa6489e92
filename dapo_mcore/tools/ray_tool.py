"""A tool on the nodes of a Ray cluster: one actor per worker, and in each the tool as a single machine has it.

Change here: how calls are spread over the nodes, and what the loss of a node means for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dapo_mcore.config.tools import ToolConfig
from dapo_mcore.errors import ConfigError, ToolError
from dapo_mcore.process.ray_cluster import connect
from dapo_mcore.tools.function_tool import all_done
from dapo_mcore.tools.result import Kind, Runner, ToolResult

_CALLS_OF_A_FUNCTION = 1000
"""At once in one actor: Ray's own limit for actors with coroutines."""
MOST_LOSSES = 3
"""Nodes that may be lost while one actor starts."""
_START_S = 300.0
"""Timeout for the start of an actor and of what runs in it: modules may come from a cold network disk."""


class RayTool:
    """A Runner whose calls run in `config.workers` actors. Raises ConfigError if the cluster cannot be used.

    build  returns the Runner of a single machine. It is called in each actor, so it must be a function of a module.
    """

    keeps_state = False
    documentation = ""

    def __init__(self, config: ToolConfig, ray_address: str | None, build: Callable[[ToolConfig], Runner]):
        assert config.workers is not None, config
        self._arguments = (config.model_copy(update={"placement": "local", "workers": 1}), build)
        self._name, self._num_hosts = config.name, config.workers
        is_pure = config.function == "python"
        self._num_attempts = 2 if is_pure else 1
        self._room = asyncio.Semaphore(self._num_hosts * (1 if is_pure else _CALLS_OF_A_FUNCTION))
        self._deadline_s = 2 * config.timeout_s + _START_S
        self._hosts: list[_Host] = []
        self._homes: dict[str, _Host] = {}
        self._starting = asyncio.Lock()
        self._disconnect = connect(ray_address)

    async def start(self) -> None:
        """Start all actors. Raise ToolError if the tool cannot be used on one of their nodes."""
        _check_room(self._num_hosts)
        await self._fill()

    async def run(self, session: str, arguments: dict[str, Any]) -> ToolResult:
        """Run the call on the node with the fewest. A lost node is an infrastructure failure, also for what it knew of a sample."""
        async with self._room:
            for _ in range(self._num_attempts):
                host = await self._host_of(session)
                try:
                    return await host.run(session, arguments, self._deadline_s)
                except _losses() as error:
                    host.lost, reason = True, error
        return ToolResult(Kind.INFRASTRUCTURE, f"the tool's node is lost: {_first_line(reason)}")

    async def end_session(self, session: str) -> None:
        """Close the state of a sample, if a node that is still there has it."""
        if (host := self._homes.pop(session, None)) and not host.lost:
            try:
                await _result(host.actor.end_session.remote(session), self._deadline_s)
            except _losses():
                host.lost = True

    async def close(self) -> None:
        """End all actors and what runs in them, and leave the cluster."""
        import ray

        if ray.is_initialized():
            for host in self._hosts:
                ray.kill(host.actor)
        self._hosts = []
        self._disconnect()

    async def _host_of(self, session: str) -> _Host:
        """Return the actor that has the sample's state, also if it is lost, else the one with the fewest calls."""
        if session in self._homes:
            return self._homes[session]
        await self._fill()
        host = min(self._hosts, key=lambda host: host.num_calls)
        if self.keeps_state:
            self._homes[session] = host
        return host

    async def _fill(self) -> None:
        """Start an actor for each that is missing or lost."""
        async with self._starting:
            self._hosts = [host for host in self._hosts if not host.lost]
            await all_done(*(self._add_host() for _ in range(self._num_hosts - len(self._hosts))))

    async def _add_host(self) -> None:
        import ray

        kind = ray.remote(ToolHost).options(num_cpus=1, scheduling_strategy="SPREAD", max_restarts=0)
        for losses in range(1, MOST_LOSSES + 1):
            host = _Host(kind.remote(*self._arguments))
            self._hosts.append(host)
            try:
                self.keeps_state, self.documentation = await _result(host.actor.start.remote(), _START_S)
                return
            except TimeoutError as error:
                raise ToolError(
                    f"the tool {self._name!r} did not start on a node within {_START_S:.0f} s; has the Ray cluster a free CPU for "
                    f"each of its {self._num_hosts} workers?"
                ) from error
            except _losses() as error:
                self._hosts.remove(host)
                if losses == MOST_LOSSES:
                    raise ToolError(
                        f"the tool {self._name!r} was lost {losses} times while it started on a node: {_first_line(error)}"
                    ) from error


@dataclass(eq=False, slots=True)
class _Host:
    """An actor and the number of its calls."""

    actor: Any
    num_calls: int = 0
    lost: bool = False

    async def run(self, session: str, arguments: dict[str, Any], deadline_s: float) -> ToolResult:
        self.num_calls += 1
        try:
            return await _result(self.actor.run.remote(session, arguments), deadline_s)
        finally:
            self.num_calls -= 1


class ToolHost:
    """The Ray actor: a Runner on the actor's node."""

    def __init__(self, config: ToolConfig, build: Callable[[ToolConfig], Runner]):
        self._runner = build(config)

    async def start(self) -> tuple[bool, str]:
        await self._runner.start()
        return self._runner.keeps_state, self._runner.documentation

    async def run(self, session: str, arguments: dict[str, Any]) -> ToolResult:
        return await self._runner.run(session, arguments)

    async def end_session(self, session: str) -> None:
        await self._runner.end_session(session)


async def _result(ref: Any, deadline_s: float) -> Any:
    """Return what an actor gives. If this is cancelled or late, the actor's work is cancelled.

    Raise the actor's ToolError as it was there, and TimeoutError or RayActorError for an actor that is lost.
    """
    import ray

    try:
        return await asyncio.wait_for(ref, deadline_s)
    except (asyncio.CancelledError, TimeoutError):
        ray.cancel(ref)
        raise
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, ToolError) else ToolError(str(error)) from error


def _losses() -> tuple[type[Exception], ...]:
    """Return what is raised for the work of an actor that has ended, or that does not answer."""
    import ray

    return ray.exceptions.RayActorError, TimeoutError


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _check_room(num_workers: int) -> None:
    import ray

    cpus = ray.cluster_resources().get("CPU", 0)
    if num_workers > cpus:
        raise ConfigError(
            f"tools: {num_workers} workers need as many CPUs, but the Ray cluster has {cpus:g}; lower workers"
        )
