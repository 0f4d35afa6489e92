"""A server as a child process: how it starts and ends, and what it wrote last.

Change here: how a child is kept from outliving its parent, and how it is ended.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

STOP_S = 5.0
"""Seconds from SIGTERM to SIGKILL."""
_PR_SET_PDEATHSIG = 1
_TAIL_BYTES, _TAIL_LINES, _LONGEST_LINE = 65536, 100, 300
_ERROR = re.compile(r"^(\w+\.)*\w*(Error|Exception)\b|: error: ")
"""The last line of a traceback, or a refused option."""
_LIBC = ctypes.CDLL(None, use_errno=True)


class LaunchedServer(Protocol):
    """A server that the run has started and may restart: a ServerProcess or a RayServer. A restart may change its URL."""

    url: str

    @property
    def alive(self) -> bool: ...

    def restart(self) -> None: ...

    def ask_to_stop(self) -> None: ...

    def stop(self, timeout_s: float = STOP_S) -> None: ...

    def last_words(self) -> str: ...

    def last_line(self) -> str: ...


class ServerProcess:
    """One server. It is killed when this process ends, however that happens.

    port  reserved for the server, also across restarts (see servers.reserve_port).
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: dict[str, str],
        folder: Path,
        name: str,
        url: str,
        port: socket.socket,
    ):
        self.url, self._port = url, port
        self._command, self._environment, self._folder = list(command), environment, folder
        self._log, self._log_start = folder / f"{name}.log", 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start the server; it can serve once /health says so. Its output is appended to the log."""
        with open(os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def ask_to_stop(self) -> None:
        if self.alive:
            self._process.terminate()

    def stop(self, timeout_s: float = STOP_S) -> None:
        """Send SIGTERM, and `timeout_s` later SIGKILL to the server and its children. May be called twice."""
        if self._process is None:
            return
        self.ask_to_stop()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        _kill_group(self._process.pid)
        self._process.wait()

    def restart(self) -> None:
        self.stop()
        self.start()

    def last_words(self) -> str:
        """Return what the server wrote last since its start, for an error message.

        If one of the last lines is an error, return that one: the server's other processes go on writing for a while.
        """
        lines = self._tail().splitlines()[-_TAIL_LINES:]
        errors = [number for number, line in enumerate(lines) if _ERROR.search(line)]
        end = errors[-1] + 1 if errors else len(lines)
        words = [line.strip()[:_LONGEST_LINE] for line in lines[max(end - 3, 0) : end]]
        return f"{' | '.join(words) or 'it wrote nothing'} (see {self._log})"

    def last_line(self) -> str:
        """Return the last line that the server wrote since its start, or an empty text."""
        lines = self._tail().splitlines()
        return lines[-1].strip()[:_LONGEST_LINE] if lines else ""

    def _tail(self) -> str:
        try:
            with self._log.open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_start, size - _TAIL_BYTES))
                return log.read().decode(errors="replace").strip()
        except OSError:
            return ""


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def stop_servers(servers: Sequence[LaunchedServer]) -> None:
    """Stop all servers at once, within STOP_S together: torchrun kills a trainer that takes 30 s to end."""
    for server in servers:
        server.ask_to_stop()
    end = time.monotonic() + STOP_S
    for server in servers:
        server.stop(max(end - time.monotonic(), 0.0))
