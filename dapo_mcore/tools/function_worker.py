"""A process that runs one of the user's tools: many calls at once, async ones on one event loop, plain ones in threads.

Change here: how a function or class is called, and which of its errors are whose. function_tool.py starts and watches it.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from dapo_mcore.errors import ToolError, describe_error
from dapo_mcore.process.plugin import load_function, parameters_of
from dapo_mcore.tools.result import Kind, ToolUnavailable
from dapo_mcore.tools.sandbox.inside import frames

_THREADS = 64
_MOST_STUCK = 8
"""Threads whose call is over its time, and which still run: with so many, the process asks to be replaced."""


class Tool:
    """The user's function, or class with an instance for each sample that calls it. Raises ToolError if it does not fit."""

    def __init__(self, name: str, function: str, properties: Sequence[str], timeout_s: float):
        self.function = load_function(function, f"tools: {name}.function", "python, calculator", ToolError)
        self.keeps_state = inspect.isclass(self.function)
        called = _method_of(self.function, name, function) if self.keeps_state else self.function
        _check_arguments(name, function, called, properties, skip_self=self.keeps_state)
        self._is_async = inspect.iscoroutinefunction(called) or inspect.iscoroutinefunction(type(called).__call__)
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix=name)
        self._states: dict[str, Any] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self.num_stuck = 0

    @property
    def documentation(self) -> str:
        return inspect.getdoc(self.function) or ""

    async def call(self, session: str, arguments: dict[str, Any]) -> tuple[Kind, str]:
        """Return how the call ended, and its text. Exceptions become results."""
        try:
            async with asyncio.timeout(self._timeout_s):
                if not self.keeps_state:
                    return await self._call(self.function, arguments)
                async with self._locks.setdefault(session, asyncio.Lock()):
                    if session not in self._states:
                        self._states[session] = await self._in_thread(self.function, {})
                    return await self._call(self._states[session], arguments)
        except TimeoutError:
            return Kind.TIMEOUT, f"[timed out after {self._timeout_s:g} s]"
        except _Raised as raised:
            return _verdict(raised.error)

    async def end(self, session: str) -> None:
        """Close the sample's state, if it has one. Errors are printed: nobody waits for them."""
        self._locks.pop(session, None)
        state = self._states.pop(session, None)
        close = getattr(state, "close", None)
        if close is not None:
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._run(close, {}, inspect.iscoroutinefunction(close))
            except (TimeoutError, _Raised) as error:
                print(f"a tool's close failed: {describe_error(getattr(error, 'error', error))}", file=sys.stderr)

    async def _call(self, target: Callable[..., Any], arguments: dict[str, Any]) -> tuple[Kind, str]:
        return _as_text(await self._run(target, arguments, self._is_async))

    async def _run(self, target: Callable[..., Any], arguments: dict[str, Any], is_async: bool) -> Any:
        if not is_async:
            return await self._in_thread(target, arguments)
        try:
            return await target(**arguments)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            raise _Raised(error) from error

    async def _in_thread(self, target: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        running = asyncio.get_running_loop().run_in_executor(self._threads, _outcome, target, arguments)
        try:
            outcome = await asyncio.shield(running)
        except asyncio.CancelledError:
            self.num_stuck += 1
            running.add_done_callback(lambda _: setattr(self, "num_stuck", self.num_stuck - 1))
            raise
        if isinstance(outcome, _Raised):
            raise outcome
        return outcome


class _Raised(Exception):
    """What the user's code raised; also SystemExit and the like, which must not end the event loop."""

    def __init__(self, error: BaseException):
        super().__init__(str(type(error)))
        self.error = error


def _outcome(target: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    try:
        return target(**arguments)
    except BaseException as error:
        return _Raised(error)


def _verdict(error: BaseException) -> tuple[Kind, str]:
    away = isinstance(error, ToolUnavailable | ConnectionError)
    return Kind.INFRASTRUCTURE if away else Kind.ERROR, describe_error(error)


def _as_text(result: Any) -> tuple[Kind, str]:
    if isinstance(result, str):
        return Kind.OK, result
    try:
        return Kind.OK, json.dumps(result, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        return Kind.INFRASTRUCTURE, (
            f"the tool gave a value of type {type(result).__name__}; it must return text (decode bytes), or a value that JSON has "
            "(neither NaN nor infinity)"
        )


def _method_of(kind: type, name: str, function: str) -> Callable[..., Any]:
    """Return the method with which an instance is called. A class itself always has one, which creates instances."""
    own = next((vars(base)["__call__"] for base in kind.__mro__ if "__call__" in vars(base)), None)
    if own is None:
        raise ToolError(
            f"tools: {name}.function {function!r} is a class without __call__, the method of one call; add it"
        )
    return own


def _check_arguments(
    name: str, function: str, called: Callable[..., Any], properties: Sequence[str], skip_self: bool
) -> None:
    parameters = parameters_of(called)[1 if skip_self else 0 :]
    try:
        inspect.Signature(parameters).bind(**dict.fromkeys(properties))
    except TypeError as error:
        raise ToolError(
            f"tools: {name}.function {function!r} does not take the arguments that its parameters declare "
            f"({', '.join(properties) or 'none'}): {error}"
        ) from error


class Server:
    """Answers messages: {id, session, arguments} is a call, {id, session} the end of a sample, and {id} cancels either."""

    def __init__(self, tool: Tool, answers: int):
        self._tool = tool
        self._answers = answers
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def serve(self, requests: asyncio.StreamReader) -> None:
        """Answer until the stream ends."""
        with suppress(EOFError):
            while True:
                self._take(**await frames.receive_from(requests))

    def _take(self, id: int, session: str | None = None, arguments: dict[str, Any] | None = None) -> None:
        if session is not None:
            task = asyncio.create_task(self._answer(id, session, arguments))
            self._tasks[id] = task
            task.add_done_callback(lambda _: self._tasks.pop(id))
        elif id in self._tasks:
            self._tasks[id].cancel()

    async def _answer(self, id: int, session: str, arguments: dict[str, Any] | None) -> None:
        start_s = time.monotonic()
        if arguments is None:
            await self._tool.end(session)
            kind, text = Kind.OK, ""
        else:
            kind, text = await self._tool.call(session, arguments)
        seconds, retire = time.monotonic() - start_s, self._tool.num_stuck >= _MOST_STUCK
        frames.send(self._answers, {"id": id, "kind": kind, "text": text, "seconds": seconds, "retire": retire})


async def serve(name: str, function: str, properties: Sequence[str], timeout_s: float) -> None:
    """Send what the tool is, or an error, then answer calls from standard input until it closes, and end the process."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what a tool prints must not disturb the answers
    try:
        tool = Tool(name, function, properties, timeout_s)
    except ToolError as error:
        frames.send(answers, {"error": str(error)})
        return
    frames.send(answers, {"keeps_state": tool.keeps_state, "documentation": tool.documentation})
    await Server(tool, answers).serve(await _standard_input())
    os._exit(0)  # threads that are stuck would keep the process


async def _standard_input() -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(0, "rb"))
    return reader


if __name__ == "__main__":
    asyncio.run(serve(**json.loads(sys.argv[1])))
