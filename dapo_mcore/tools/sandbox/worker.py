"""One box from outside: how it is started and attacked before use, and one request after another.

Change here: what a new worker must withstand, or how its answers become outcomes. pool.py has many workers.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import socket
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo_mcore.errors import ToolError
from dapo_mcore.tools.sandbox.inside import canary, cell, frames
from dapo_mcore.tools.sandbox.mechanisms import ENVIRONMENT, MECHANISMS, readable_paths, template_settings

START_S = 180.0
"""Timeout for a worker's start: it may load modules from a cold network disk."""
GRACE_S = 10.0
"""Beyond a call's own timeout. A worker that is later than this is lost: the box enforces the timeout itself."""
_CANARY_S = 60.0
_CANARY_BYTES = 4000
_HIDDEN = ("/etc/passwd", "/etc/shadow", "/proc/self", "/sys", "/root/.ssh", "/var")


class WorkerLost(Exception):
    """The process in front of a box has ended, or does not answer. The message says what it printed last."""


@dataclass(frozen=True, slots=True)
class Settings:
    """A worker: what each call may use, and the modules that it loads at its start."""

    limits: cell.Limits
    preload: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Ending:
    """How a call ended: `ended` is exit (with the exit `status`), signal (its number), timeout, flood or no cell.

    head, tail  the beginning and the end of what it printed; between them `left_out` bytes are missing.
    """

    ended: str
    status: int
    head: str
    tail: str
    left_out: int
    seconds: float
    cpu_seconds: float


class Worker:
    """A box that runs one call at a time. Create it with `start`. `usable` is False while it owes an answer."""

    def __init__(self, process: asyncio.subprocess.Process, errors: int):
        self._process = process
        self._errors = errors
        self.usable = False

    @classmethod
    async def start(cls, mechanism: str, settings: Settings) -> Worker:
        """Start a box and let the canary attack it. Raise WorkerLost if it does not start, ToolError if an attack succeeds."""
        given = template_settings(settings.limits, settings.preload, needs_landlock=mechanism == "namespaces")
        errors = os.memfd_create("errors")
        try:
            process = await asyncio.create_subprocess_exec(
                *MECHANISMS[mechanism](given),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=ENVIRONMENT,
                start_new_session=True,  # Ctrl-C in the terminal does not reach it
            )
        except BaseException:
            os.close(errors)
            raise
        worker = cls(process, errors)
        try:
            await worker._await_ready()
            await worker._withstand(mechanism)
        except BaseException:
            await worker.close()
            raise
        return worker

    async def run(self, code: str, timeout_s: float, output_bytes: int) -> Ending:
        """Run the code in a new cell. Raise WorkerLost if the worker cannot be used any longer.

        If this is cancelled, the cell is killed, and the worker may be used again.
        """
        request = {"code": code, "timeout_s": timeout_s, "output_bytes": output_bytes}
        try:
            await self._send(request)
            answer = asyncio.ensure_future(self._receive(timeout_s + GRACE_S))
            try:
                return Ending(**await asyncio.shield(answer))
            except asyncio.CancelledError:
                await self._send(None)
                with suppress(WorkerLost):
                    await answer
                raise
        except OSError as error:
            raise WorkerLost(self._last_words(f"{type(error).__name__}: {error}")) from error

    async def close(self) -> None:
        """Kill the box and all that is in it."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        self._process._transport.close()  # else the pipes stay open until the garbage collector comes
        os.close(self._errors)

    async def _await_ready(self) -> None:
        answer = await self._receive(START_S)
        if "error" in answer:
            raise ToolError(f"the Python sandbox cannot load its modules: {answer['error']}; change sandbox.preload")

    async def _withstand(self, mechanism: str) -> None:
        """Raise ToolError unless every attack of the canary fails, and WorkerLost if it does not report."""
        with Bait() as bait:
            nonce = secrets.token_hex(16)
            attack = f"{Path(canary.__file__).read_text()}\nprint({nonce!r}, *breaches({bait!r}))"
            ending = await self.run(attack, _CANARY_S, _CANARY_BYTES)
        words = ending.head.split()
        if ending.ended != "exit" or words[:1] != [nonce]:
            raise WorkerLost(f"a call cannot be walled in: {ending.head.strip() or ending.ended}")
        if breached := words[1:]:
            raise ToolError(
                f"the sandbox ({mechanism}) does not hold here: {', '.join(breached)} succeeded in it. No model-written code runs"
            )

    async def _send(self, message: Any) -> None:
        self.usable = False
        self._process.stdin.write(frames.encode(message))
        await self._process.stdin.drain()

    async def _receive(self, timeout_s: float) -> Any:
        try:
            answer = await asyncio.wait_for(frames.receive_from(self._process.stdout), timeout_s)
            self.usable = True
            return answer
        except TimeoutError as error:
            raise WorkerLost(self._last_words(f"no answer within {timeout_s:g} s")) from error
        except (EOFError, OSError, json.JSONDecodeError) as error:
            await asyncio.sleep(0.1)  # its last words come through another pipe
            raise WorkerLost(self._last_words("it has ended")) from error

    def _last_words(self, what: str) -> str:
        size = os.fstat(self._errors).st_size
        lines = os.pread(self._errors, 2000, max(0, size - 2000)).decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        return f"{what}: {last}" if last else what


class Bait:
    """Things that an attack could reach without walls: a server, a key in a file, hidden files. A context manager."""

    def __enter__(self) -> dict[str, Any]:
        self._server = socket.create_server(("127.0.0.1", 0))
        elsewhere = "/var/tmp" if os.access("/var/tmp", os.W_OK) else None  # a cell's own /tmp would cover it
        self._folder = tempfile.TemporaryDirectory(dir=elsewhere)
        os.chmod(self._folder.name, 0o777)  # the walls must protect it, not its mode
        key = Path(self._folder.name, "key")
        key.write_text(secrets.token_hex(16))
        return {
            "port": self._server.getsockname()[1],
            "key_file": str(key),
            "hidden": _hidden_paths(),
            "variable": next((name for name in os.environ if name not in (*ENVIRONMENT, "PWD")), ""),
            "system_folders": ["/", "/usr", "/usr/lib", "/dev", "/dev/shm", "/var/tmp", *readable_paths()],
            "trainer": os.getpid(),
        }

    def __exit__(self, *_: object) -> None:
        self._server.close()
        self._folder.cleanup()


def _hidden_paths(most: int = 50) -> list[str]:
    """Return paths of the system and of the user's home that are not on the way to Python."""
    shown = [Path(path) for path in readable_paths()]
    try:
        home = sorted(Path.home().iterdir())[:most]
    except OSError:
        home = []
    candidates = [*map(Path, _HIDDEN), *home]
    return [str(p) for p in candidates if not any(s.is_relative_to(p) or p.is_relative_to(s) for s in shown)]
