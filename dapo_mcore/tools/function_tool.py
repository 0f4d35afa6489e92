"""A tool of the user's own, in processes beside the trainer: one that hangs or dies takes no step and no rank with it.

Change here: how the processes are started, watched and replaced. function_worker.py runs inside them.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from dapo_mcore.config.tools import ToolConfig
from dapo_mcore.errors import ToolError
from dapo_mcore.process.plugin import plugin_environment
from dapo_mcore.tools.result import Kind, ToolResult, clip
from dapo_mcore.tools.sandbox.inside import frames

START_S = 180.0
"""Timeout for a process's start: the function's module may import much from a cold network disk."""
GRACE_S = 5.0
"""Beyond a call's own timeout. A process that is later than this is stuck as a whole, and is killed."""


class FunctionTool:
    """The processes of one tool. A sample whose tool keeps state has all its calls in one of them."""

    def __init__(self, config: ToolConfig, function: str, parameters: dict[str, Any]):
        self._config = config
        self._arguments = {
            "name": config.name,
            "function": function,
            "properties": list(parameters.get("properties", {})),
            "timeout_s": config.timeout_s,
        }
        self._processes: list[_Process] = []
        self._retired: list[_Process] = []
        self._homes: dict[str, _Process] = {}
        self._starting = asyncio.Lock()

    async def start(self) -> None:
        """Start all processes. Raise ToolError if the function cannot be loaded or does not take its arguments."""
        await self._fill()

    @property
    def keeps_state(self) -> bool:
        """True if the function is a class, with an instance for each sample."""
        return self._processes[0].keeps_state

    @property
    def documentation(self) -> str:
        """The function's docstring."""
        return self._processes[0].documentation

    async def run(self, session: str, arguments: dict[str, Any]) -> ToolResult:
        """Call the function once. A lost process is an infrastructure failure, also for what it knew of a sample."""
        process = await self._process_of(session)
        try:
            answer = await process.call(session, arguments, self._config.timeout_s + GRACE_S)
        except _Lost as lost:
            return ToolResult(Kind.INFRASTRUCTURE, str(lost))
        except TimeoutError:
            return ToolResult(Kind.TIMEOUT, f"[timed out after {self._config.timeout_s:g} s]")
        finally:
            await self._reap()
        text = clip(answer["text"], self._config.max_output_characters)
        return ToolResult(Kind(answer["kind"]), text, answer["seconds"])

    async def end_session(self, session: str) -> None:
        """Close the state of a sample, and return when it is closed or its process is lost."""
        if process := self._homes.get(session):
            with suppress(_Lost, TimeoutError):
                await process.end(session, self._config.timeout_s + GRACE_S)
            self._homes.pop(session, None)
            await self._reap()

    async def close(self) -> None:
        """Kill all processes."""
        await asyncio.gather(*(process.close() for process in [*self._processes, *self._retired]))
        self._processes, self._retired = [], []

    async def _process_of(self, session: str) -> _Process:
        if session in self._homes:
            return self._homes[session]
        await self._fill()
        process = min(self._processes, key=lambda process: process.num_calls)
        if process.keeps_state:
            self._homes[session] = process
        return process

    async def _fill(self) -> None:
        """Start a process for each that has ended or asks to be replaced."""
        async with self._starting:
            self._retired += [process for process in self._processes if process.must_go]
            self._processes = [process for process in self._processes if not process.must_go]
            missing = (self._config.workers or 1) - len(self._processes)
            await all_done(*(self._add_process() for _ in range(missing)))

    async def _add_process(self) -> None:
        self._processes.append(await _Process.start(self._arguments))

    async def _reap(self) -> None:
        """Kill retired processes that no sample needs."""
        needed = set(self._homes.values())
        idle = [process for process in self._retired if not process.num_calls and process not in needed]
        self._retired = [process for process in self._retired if process not in idle]
        await asyncio.gather(*(process.close() for process in idle))


class _Lost(Exception):
    """The process ended during a call, or before it with the sample's state."""


class _Process:
    """One process and the calls that it owes an answer."""

    def __init__(self, process: asyncio.subprocess.Process, ready: dict[str, Any]):
        self._process = process
        self.keeps_state: bool = ready["keeps_state"]
        self.documentation: str = ready["documentation"]
        self.must_go = False
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._last_number = 0
        self._listener = asyncio.create_task(self._listen())

    @classmethod
    async def start(cls, arguments: dict[str, Any]) -> _Process:
        """Start a process. Raise ToolError if it does not load the function in time."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "dapo_mcore.tools.function_worker", json.dumps(arguments),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=plugin_environment(), start_new_session=True,
        )  # fmt: skip
        try:
            ready = await asyncio.wait_for(frames.receive_from(process.stdout), START_S)
        except (EOFError, OSError, TimeoutError) as error:
            await _kill(process)
            raise ToolError(
                f"a process for the tool {arguments['name']!r} did not start ({type(error).__name__}; timeout {START_S:.0f} s); "
                "its output is above"
            ) from error
        except BaseException:
            await _kill(process)
            raise
        if "error" in ready:
            await _kill(process)
            raise ToolError(ready["error"])
        return cls(process, ready)

    @property
    def num_calls(self) -> int:
        return len(self._waiting)

    async def call(self, session: str, arguments: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        """Return the answer. Raise _Lost if the process ends, TimeoutError after killing one that does not answer at all."""
        return await self._answer_to({"session": session, "arguments": arguments}, deadline_s)

    async def end(self, session: str, deadline_s: float) -> None:
        """Close the state of a sample. Raise as `call` does."""
        await self._answer_to({"session": session}, deadline_s)

    async def _answer_to(self, message: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        if self._listener.done():
            raise _Lost("the tool's process has ended, and with it what it knew of this sample")
        self._last_number += 1
        number, answer = self._last_number, asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            await self._send({"id": number, **message})
            return await asyncio.wait_for(answer, deadline_s)
        except TimeoutError:
            await self.close()
            raise
        except asyncio.CancelledError:
            await self._send({"id": number})
            raise
        finally:
            self._waiting.pop(number, None)

    async def close(self) -> None:
        self.must_go = True
        await _kill(self._process)
        await asyncio.wait([self._listener])

    async def _send(self, message: dict[str, Any]) -> None:
        with suppress(OSError):  # the listener sees the end, too
            self._process.stdin.write(frames.encode(message))
            await self._process.stdin.drain()

    async def _listen(self) -> None:
        """Hand each answer to its call, until the process ends."""
        with suppress(EOFError, OSError, ValueError):
            while True:
                answer = await frames.receive_from(self._process.stdout)
                self.must_go = self.must_go or answer["retire"]
                waiting = self._waiting.get(answer["id"])
                if waiting is not None and not waiting.done():
                    waiting.set_result(answer)
        self.must_go = True
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(_Lost("the tool's process ended during the call"))


async def all_done(*starts: Coroutine[Any, Any, None]) -> None:
    """Wait for all, then raise the first error: what the others have started can be closed only when it is known."""
    found = await asyncio.gather(*starts, return_exceptions=True)
    if error := next((result for result in found if result is not None), None):
        raise error


async def _kill(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
    process._transport.close()  # else the pipes stay open until the garbage collector comes
