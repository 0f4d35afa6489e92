"""A run that is asked to stop by a file: `touch runs/NAME/stop`. It saves, and ends with status 0.

    stop      made by a user, or by the batch script of a job whose time ends
    requeue   made here once the run is saved, and by the watchdog of a job that hangs: the job may be started again

torchrun turns every status of a rank into 1, and passes only some signals on, so files carry both messages.
Change here: the names of the files, and how soon `stop` is seen.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

STOP, REQUEUE = "stop", "requeue"
_POLL_S = 1.0


class StopFile:
    """The files `stop` and `requeue` of a run's folder, on rank 0. Those of an earlier run are removed.

    since  when this run was started, in seconds since the epoch. A `stop` that is not older is meant for it: Python imports for
           up to a minute before this object exists.
    tell   gets a line if an older `stop` is removed.
    """

    def __init__(self, run_dir: Path, since: float, tell: Callable[[str], None]):
        self.path, self._requeue = run_dir / STOP, run_dir / REQUEUE
        self._closed = threading.Event()
        self._requeue.unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            if self.path.stat().st_mtime < since:
                self.path.unlink()
                tell(f"{self.path} is older than this start, so it was removed; make it again to stop this run")

    def watch(self, on_found: Callable[[], None]) -> None:
        """Call `on_found` once in another thread when `stop` is there; on a network file system it may be seen a minute late."""

        def watch() -> None:
            while not self._closed.wait(_POLL_S):
                with suppress(OSError):  # a file server that does not answer now may do so later
                    if self.path.exists():
                        return on_found()

        threading.Thread(target=watch, name="stop-file", daemon=True).start()

    def confirm(self, step: int) -> None:
        """Write `requeue`, {"step": the last rollout step that is saved}, and remove `stop`."""
        partial = self._requeue.with_name(f"{REQUEUE}.partial")
        partial.write_text(json.dumps({"step": step}) + "\n", encoding="utf-8")
        partial.replace(self._requeue)
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
