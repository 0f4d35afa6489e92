"""What a run has left on the machine after its end: processes, memory, temporary folders, half-written files.

Change here: where is looked.
"""

from __future__ import annotations

import stat
import time
from collections.abc import Iterator
from pathlib import Path

from tools.soak.job import family

SHARED = Path("/dev/shm")
_HALF_WRITTEN = (".partial", ".new", ".deleted", ".lock")
_PATIENCE_S = 30.0
"""The watchdog and orphans look once a second whether their run has ended."""


def leftovers(mark: str, run_dir: Path, temporary: Path, known: frozenset[str] = frozenset()) -> list[str]:
    """Return a line for each thing that is still there; waits for processes that are about to end.

    known   names in /dev/shm that were there before the run.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while (found := list(_all(mark, run_dir, temporary, known))) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


def shared_names() -> frozenset[str]:
    """Return the names of this project's files in shared memory."""
    return frozenset(path.name for path in SHARED.glob("dapo_mcore-*"))


def _all(mark: str, run_dir: Path, temporary: Path, known: frozenset[str]) -> Iterator[str]:
    for process in family(mark):
        yield f"process {process.pid}: {' '.join(process.cmdline())[:120]}"
    yield from (f"shared memory {SHARED / name}" for name in sorted(shared_names() - known))
    yield from (f"temporary {path}" for path in sorted(temporary.iterdir()))
    for path in sorted(run_dir.rglob("*")):
        if path.name.endswith(_HALF_WRITTEN):
            yield f"half-written {path}"
        elif stat.S_ISSOCK(path.lstat().st_mode):
            yield f"socket {path}"
