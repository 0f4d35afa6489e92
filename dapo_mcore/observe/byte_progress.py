"""Progress of a long copy: bytes, speed and remaining time. A terminal shows a bar; elsewhere there is one line per tenth,
at most one per second, and one at the end.

Change here: how it looks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


class ByteProgress:
    """A context manager: `start` sets the total, `advance` adds to what is done. It writes to standard error."""

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
        self._began = self._told = clock()
        self._lock = Lock()

    def __enter__(self) -> ByteProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start(self, total: int, done: int) -> None:
        """Start with `total` bytes, of which `done` were copied earlier and do not count for the speed."""
        self._total, self._done, self._first = total, done, done
        self._began = self._told = self._clock()
        self._said = self._tenth()
        self._bar.reset(self._task, total=total, completed=done)
        if done:
            self.console.print(f"{self._title}: continues at {done / 1e9:.2f} of {total / 1e9:.2f} GB")

    def advance(self, num_bytes: int) -> None:
        """Add `num_bytes` to what is done. Any thread may call this."""
        with self._lock:
            self._done += num_bytes
            self._bar.advance(self._task, num_bytes)
            due = self._clock() >= self._told + 1 or self._done == self._total
            if not self.console.is_terminal and self._tenth() > self._said and due:
                self._said, self._told = self._tenth(), self._clock()
                self.console.print(self._line(), soft_wrap=True)

    def _tenth(self) -> int:
        return self._done * 10 // max(self._total, 1)

    def _line(self) -> str:
        seconds = max(self._clock() - self._began, 1e-9)
        speed = (self._done - self._first) / seconds
        left = (self._total - self._done) / max(speed, 1e-9)
        return f"{self._title}: {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {speed / 1e9:.2f} GB/s, {left:.0f} s left"
