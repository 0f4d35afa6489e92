"""What is shown while a run's servers start, which takes from half a minute to several.

Change here: the words. How it looks on a terminal and in a pipe is observe/progress.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dapo_mcore.config.sglang import SGLangConfig
from dapo_mcore.observe.progress import NullProgress, format_seconds
from dapo_mcore.rollout.sglang.launch.process import OwnedServer

_TELL_S = 30.0


class Startup:
    """The start of `count` servers, as it is shown."""

    def __init__(self, progress: NullProgress, count: int, hint: str, clock: Callable[[], float]):
        self._progress, self._count, self._hint, self._clock = progress, count, hint, clock
        self._start, self._num_up, self._num_told = clock(), 0, 0

    @property
    def seconds(self) -> str:
        return format_seconds(self._clock() - self._start)

    def is_up(self) -> None:
        """One more server can be used; from any thread."""
        self._num_up += 1
        self._progress.advance()

    async def waiting(self, server: OwnedServer) -> None:
        """Show, every half minute, for how long and what `server` wrote last. Call it often while one is waited for."""
        if self._clock() - self._start < _TELL_S * (self._num_told + 1):
            return
        self._num_told += 1
        line = await asyncio.to_thread(server.last_line)
        wrote = f"{server.url} last wrote: {line}" if line else f"{server.url} has written nothing yet"
        self._progress.line(f"{self._num_up} of {self._count} servers up after {self.seconds}{self._hint}; {wrote}")


@contextmanager
def shown_startup(
    progress: NullProgress, settings: SGLangConfig, folder: Path, clock: Callable[[], float] = time.monotonic
) -> Iterator[Startup]:
    """Gives what is told of the servers meanwhile.

    On a terminal a bar counts the servers that are up and the seconds; a line says when they begin, one every half minute
    how it goes, and one when all are up. Servers at `urls` are not started, and have the bar alone.
    """
    count = settings.num_servers
    hint = " (a first start on a machine compiles kernels, about two minutes)" if settings.device == "cuda" else ""
    startup = Startup(progress, count, hint, clock)
    servers = "1 SGLang server" if count == 1 else f"{count} SGLang servers"
    if not settings.urls:
        place = "by Ray, logs on their nodes" if settings.placement == "ray" else "logs"
        progress.line(f"starting {servers} ({place} in {folder})")
    progress.phase("servers", total=count)
    try:
        yield startup
    finally:
        progress.clear()
    if not settings.urls:
        progress.line(f"{count} of {servers} up after {startup.seconds}")
