"""The live view of a long copy: bytes, speed and remaining time; a bar on a terminal, a line every tenth elsewhere.

Change here: how it looks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


class ByteProgress:
    """A context manager; `start` tells the total, `advance` what was done. On standard error, so output stays clean."""

    def __init__(self, title: str, console: Console | None = None, clock: Callable[[], float] = time.monotonic):
        self.console = console or Console(stderr=True)
        self._title, self._clock = title, clock
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self._task = self._bar.add_task(title, total=None)
        self._total = self._done = self._first = self._said = 0
        self._began = clock()
        self._lock = Lock()

    def __enter__(self) -> ByteProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start(self, total: int, done: int) -> None:
        """`done` bytes were there before; they do not count as speed."""
        self._total, self._done, self._first, self._began = total, done, done, self._clock()
        self._said = self._tenth()
        self._bar.reset(self._task, total=total, completed=done)
        if done:
            self.console.print(f"{self._title}: goes on at {done / 1e9:.2f} of {total / 1e9:.2f} GB")

    def advance(self, num_bytes: int) -> None:
        """From any thread."""
        with self._lock:
            self._done += num_bytes
            self._bar.advance(self._task, num_bytes)
            if not self.console.is_terminal and self._tenth() > self._said:
                self._said = self._tenth()
                self.console.print(self._line(), soft_wrap=True)

    def _tenth(self) -> int:
        return self._done * 10 // max(self._total, 1)

    def _line(self) -> str:
        seconds = max(self._clock() - self._began, 1e-9)
        speed = (self._done - self._first) / seconds
        left = (self._total - self._done) / max(speed, 1e-9)
        return f"{self._title}: {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {speed / 1e9:.2f} GB/s, {left:.0f} s left"
