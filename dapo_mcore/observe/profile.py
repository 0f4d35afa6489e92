"""A profile of chosen rollout steps, to see where the time goes.

Change here: what a profile records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dapo_mcore.observe.sinks import attempt


@contextmanager
def profiled(path: Path | None, tell: Callable[[str], None]) -> Iterator[None]:
    """Write a Chrome trace of what this process and its GPU do in the block to `path` (*.json.gz). None only runs the block.

    `tell` gets a line with the path, or a warning if the file cannot be written. A block that raises leaves no trace.
    """
    if path is None:
        yield
        return
    from torch.profiler import profile

    with profile() as recorded:  # all activities that this machine has
        yield
    if attempt("write the profile", lambda: _write(recorded, path), tell):
        tell(f"profile: {path} (open it with ui.perfetto.dev or chrome://tracing)")


def _write(recorded: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(path))
