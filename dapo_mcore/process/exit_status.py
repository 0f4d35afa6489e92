"""The exit status of one process of a job, and what it says of an error: rank 0 on standard error, every rank to torchrun,
whose report ends with the message of the first rank that failed.

Change here: which errors get one line instead of a traceback, and the statuses.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from dapo_mcore.errors import DapoError, OtherRankFailed, output_error
from dapo_mcore.process.signals import Interrupted

_LATER_S = 2


def exit_status(work: Callable[[], None]) -> int:
    """0 done, 2 an error that the user can mend, 128 + n ended by signal n (signals.py). Any other error is raised."""
    stopped: list[int] = []
    atexit.register(_leave_at_once, stopped)
    try:
        with _no_traceback_of_ctrl_c():
            work()
    except Interrupted as stop:
        stopped.append(stop.status)
        return stop.status
    except Exception as error:
        told = _for_users(error)
        if told is None:
            record_failure(f"{type(error).__name__}: {error}")
            raise
        _tell(told)
        return 2
    return 0


def _for_users(error: Exception) -> DapoError | None:
    """Return what to say in one line instead of a traceback; None for an error that only its traceback explains."""
    if is_lost_rank(error):
        return OtherRankFailed(f"another rank has ended, and its error is the cause; here: {error}")
    if isinstance(error, OSError):
        error = output_error(error, "go on")
    return error if isinstance(error, DapoError) else None


@contextmanager
def _no_traceback_of_ctrl_c() -> Iterator[None]:
    """Ranks have nothing to clean up, so they just end; rank 0 listens by itself (signals.py)."""
    ours = threading.current_thread() is threading.main_thread()
    ours = ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave_at_once(status: list[int]) -> None:
    """Ends the process with the status, where there is one by then: as Python ends torch would wait for ranks that are
    gone. Registered before the run, it comes after all that the run has registered."""
    if status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status[0])


def _tell(error: DapoError) -> None:
    """On rank 0, and elsewhere where rank 0 may not know of it and torchrun does not say it."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
    follows = isinstance(error, OtherRankFailed)
    if not record_failure(str(error), follows) and rank != "0" and not follows:
        print(f"error on rank {rank}: {error}", file=sys.stderr, flush=True)


def is_lost_rank(error: Exception) -> bool:
    """Whether gloo raised it because another rank is gone; torch gives it no type of its own."""
    return isinstance(error, RuntimeError) and "gloo" in str(error) and " by peer" in str(error)


def record_failure(message: str, follows: bool = False) -> bool:
    """Whether torchrun has started this process: it then ends its report with the message of the first rank that failed.

    follows  another rank's failure is the cause of this one.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is not None:
        # torchrun takes the earliest for the cause, counting in whole seconds; a cause may be recorded a little late
        timestamp = int(time.time()) + (_LATER_S if follows else 0)
        content = {"message": {"message": message, "extraInfo": {"timestamp": str(timestamp)}}}
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:  # a full disk may be what it is about
            json.dump(content, file)
    return path is not None
