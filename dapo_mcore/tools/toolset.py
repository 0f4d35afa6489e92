"""The tools of a run, for a rollout: any number of calls at once, from any thread, without blocking it.

Change here: what happens between a policy's call and a tool. The tools themselves are in python_tool.py and function_tool.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from dapo_mcore.config.tools import ToolConfig
from dapo_mcore.process.loop_thread import LoopThread
from dapo_mcore.tools import calculator, python_tool
from dapo_mcore.tools.arguments import Arguments
from dapo_mcore.tools.function_tool import FunctionTool, all_done
from dapo_mcore.tools.python_tool import PythonTool
from dapo_mcore.tools.ray_tool import RayTool
from dapo_mcore.tools.result import Kind, Runner, ToolResult


class ToolSet:
    """All tools, started. Raises ToolError if one cannot be used, or if no sandbox holds for model-written code.

    Calls run on a thread and an event loop of their own. A session is one sample: any text that no other sample has.

    ray_address  of the cluster for tools with placement ray; None for one of this machine.
    """

    def __init__(self, configs: Sequence[ToolConfig], ray_address: str | None = None):
        self._tools: dict[str, tuple[ToolConfig, Runner, Arguments]] = {}
        self._calls: dict[str, set[asyncio.Task[Any]]] = {}
        self._loop = LoopThread("tools")
        try:
            for config in configs:
                self._tools[config.name] = (config, *_build(config, ray_address))
            self._loop.run(self._start())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ToolSet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """The tools as OpenAI function schemas, as chat templates take them."""
        return [
            {
                "type": "function",
                "function": {
                    "name": name,
                    "description": config.description or _description(config, runner),
                    "parameters": arguments.schema,
                },
            }
            for name, (config, runner, arguments) in self._tools.items()
        ]

    def call(
        self, session: str, name: str, arguments: Mapping[str, Any] | str, is_code: bool = False
    ) -> Future[ToolResult]:
        """Start a call and return its future; `cancel` of it ends the call. The policy's errors are results, too.

        arguments  a mapping, or what the policy wrote: a JSON object, or for a tool with one argument its text as it stands.
        is_code    for a tool with one argument: the text as it stands, even if it is a JSON object.
        The future raises ToolError if the tool cannot go on at all.
        """
        return self._loop.submit(self._tracked(session, self._call(session, name, arguments, is_code)))

    def close_session(self, session: str) -> Future[None]:
        """Start the end of a sample: cancel its calls, then close what its tools keep of it. Return when that is done."""
        return self._loop.submit(self._close_session(session))

    def num_calls(self) -> int:
        """Return how many calls run or wait."""
        return sum(map(len, list(self._calls.values())))

    def close(self) -> None:
        """Cancel all calls and end all processes. May be called twice."""
        if not self._loop.closed:
            self._loop.run(self._stop())
            self._loop.close()

    async def _start(self) -> None:
        await all_done(*(runner.start() for _, runner, _ in self._tools.values()))

    async def _stop(self) -> None:
        for session in list(self._calls):
            await self._cancel_calls(session)
        await asyncio.gather(*(runner.close() for _, runner, _ in self._tools.values()))

    async def _tracked(self, session: str, work: Coroutine[Any, Any, ToolResult]) -> ToolResult:
        task = asyncio.current_task()
        tasks = self._calls.setdefault(session, set())
        tasks.add(task)
        try:
            return await work
        finally:
            tasks.discard(task)
            if not tasks:
                self._calls.pop(session, None)

    async def _call(self, session: str, name: str, arguments: Mapping[str, Any] | str, is_code: bool) -> ToolResult:
        if name not in self._tools:
            return ToolResult(
                Kind.ERROR, f"there is no tool {name!r:.80}; the tools are: {', '.join(self._tools) or 'none'}"
            )
        _, runner, known = self._tools[name]
        try:
            fitting = known.read(arguments, is_code)
        except ValueError as error:
            return ToolResult(Kind.ERROR, f"the arguments do not fit {name}: {error}")
        start_s = time.monotonic()
        result = await runner.run(session, fitting)
        waited = max(0.0, time.monotonic() - start_s - result.seconds)
        return ToolResult(result.kind, result.text, result.seconds, waited, result.cpu_seconds)

    async def _close_session(self, session: str) -> None:
        await self._cancel_calls(session)
        for _, runner, _ in self._tools.values():
            await runner.end_session(session)

    async def _cancel_calls(self, session: str) -> None:
        tasks = list(self._calls.get(session, ()))
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _build(config: ToolConfig, ray_address: str | None) -> tuple[Runner, Arguments]:
    arguments = Arguments(config.name, _parameters(config))
    if config.placement == "ray":
        return RayTool(config, ray_address, local_runner), arguments
    return local_runner(config), arguments


def local_runner(config: ToolConfig) -> Runner:
    """Return what runs the tool on this machine."""
    if config.function == "python":
        return PythonTool(config)
    function = f"{calculator.__name__}:calculate" if config.function == "calculator" else config.function
    return FunctionTool(config, function, _parameters(config))


def _parameters(config: ToolConfig) -> dict[str, Any]:
    built_in = {"python": python_tool.PARAMETERS, "calculator": calculator.PARAMETERS}
    return config.parameters or built_in[config.function]


def _description(config: ToolConfig, runner: Runner) -> str:
    return calculator.DESCRIPTION if config.function == "calculator" else runner.documentation
