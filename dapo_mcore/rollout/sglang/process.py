"""A server as a child process: start, end, last words.

Change here: how a child is kept from outliving its parent, and how it is ended.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

STOP_S = 5.0
"""From the request to end to the end by force."""
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


class ServerProcess:
    """One server. It dies with this process, however that ends.

    port  reserved for it, across restarts (see reserve_port).
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
        self._log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Starts it; it serves when /health says so. Its output goes to the end of the log."""
        with open(os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
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

    def stop(self, patience_s: float = STOP_S) -> None:
        """Ends it and its children: politely first, `patience_s` later at once. May be called twice."""
        if self._process is None:
            return
        self.ask_to_stop()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(patience_s)
        _kill_group(self._process.pid)
        self._process.wait()

    def restart(self) -> None:
        self.stop()
        self.start()

    def last_words(self, count: int = 3) -> str:
        """The log's last lines, for an error message."""
        try:
            lines = self._log.read_text(errors="replace").strip().splitlines()[-count:]
        except OSError:
            lines = []
        return f"{' | '.join(lines) or 'it wrote nothing'} (see {self._log})"


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
