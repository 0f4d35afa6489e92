"""What is shown while a run's servers start, which takes from half a minute to several.

Change here: the words. How it looks on a terminal and in a pipe is observe/progress.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dapo_mcore.config_sglang import SGLangConfig
from dapo_mcore.observe.progress import NullProgress, format_seconds


@contextmanager
def shown_startup(
    progress: NullProgress, settings: SGLangConfig, folder: Path, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[], None]]:
    """Gives what to call, from any thread, for each server that is up.

    On a terminal a bar counts the servers that are up and the seconds; a line says when they begin, and one when all
    are up. Servers at `urls` are not started, and have the bar alone.
    """
    count, start = settings.num_servers, clock()
    servers = "1 SGLang server" if count == 1 else f"{count} SGLang servers"
    if not settings.urls:
        place = "by Ray, logs on their nodes" if settings.placement == "ray" else "logs"
        progress.line(f"starting {servers} ({place} in {folder})")
    progress.phase("servers", total=count)
    try:
        yield progress.advance
    finally:
        progress.clear()
    if not settings.urls:
        progress.line(f"{count} of {servers} up after {format_seconds(clock() - start)}")
