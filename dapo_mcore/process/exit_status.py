"""Exit status and last message of one process of a job.

Rank 0 prints its error. Every rank also hands its error to torchrun, whose report ends with the message of the first rank
that failed. Change here: which errors get one line instead of a traceback, and the statuses.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dapo_mcore.errors import DapoError, OtherRankFailed, output_error
from dapo_mcore.process.signals import Interrupted

_CONSEQUENCE_DELAY_S = 2


def exit_status(work: Callable[[], None]) -> int:
    """Run `work` and return the exit status of the process: 0 on success, 2 for an error that the user can mend, 128 + n
    after signal n (signals.py). Raise any other error."""
    signal_status: list[int] = []
    atexit.register(_exit_without_waiting, signal_status)
    try:
        with _default_ctrl_c():
            work()
    except Interrupted as interruption:
        signal_status.append(interruption.status)
        return interruption.status
    except Exception as error:
        user_error = _as_user_error(error)
        if user_error is None:
            record_failure(f"{type(error).__name__}: {error}")
            raise
        _report(user_error)
        return 2
    return 0


def _as_user_error(error: Exception) -> DapoError | None:
    """Return the error whose one-line message replaces a traceback; None for an error that needs its traceback."""
    if is_lost_rank(error):
        loss = re.search(r"[\w ]* by peer", str(error))[0].strip()  # the rest is gloo's advice for its developers
        return OtherRankFailed(
            f"another rank has ended, and its error is the cause; this one has lost the connection ({loss})"
        )
    if _has_timed_out(error):
        return OtherRankFailed(
            "this rank has waited parallel.timeout_minutes in vain for another one, which hangs or is gone; the logs of the others "
            f"may say why. The same command goes on from the newest checkpoint; here: {error}"
        )
    if isinstance(error, OSError):
        error = output_error(error, "go on")
    return error if isinstance(error, DapoError) else None


@contextmanager
def _default_ctrl_c() -> Iterator[None]:
    """Let SIGINT end the process without Python's traceback. Ranks have nothing to clean up; rank 0 has handlers of its own
    (signals.py)."""
    is_pythons = threading.current_thread() is threading.main_thread()
    is_pythons = is_pythons and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_pythons:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if is_pythons:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _exit_without_waiting(signal_status: list[int]) -> None:
    """End the process with the status if a signal has set one: at exit, torch would wait for ranks that are gone.

    Registered before the run starts, so it runs after all exit handlers of the run.
    """
    if signal_status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(signal_status[0])


def _report(error: DapoError) -> None:
    """Print the error on rank 0. Print it on another rank only if neither rank 0 nor torchrun reports it."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
    is_consequence = isinstance(error, OtherRankFailed)
    if not record_failure(str(error), is_consequence) and rank != "0" and not is_consequence:
        print(f"error on rank {rank}: {error}", file=sys.stderr, flush=True)


def is_lost_rank(error: Exception) -> bool:
    """Return True if gloo raised the error because another rank is gone. torch has no error type for this."""
    return isinstance(error, RuntimeError) and "gloo" in str(error) and " by peer" in str(error)


def _has_timed_out(error: Exception) -> bool:
    """Return True if gloo raised the error because a collective took longer than its limit. torch has no error type for this."""
    told = "gloo" in str(error) and "Timed out waiting" in str(error)
    return isinstance(error, RuntimeError) and (told or "Application timeout caused pair closure" in str(error))


def record_failure(message: str, is_consequence: bool = False) -> bool:
    """Write the message to torchrun's error file. Return False if torchrun did not start this process.

    torchrun ends its report with the earliest message of all ranks.

    is_consequence  True if another rank's failure caused this one.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is not None:
        write_failure(path, os.environ.get("RANK"), message, is_consequence)
    return path is not None


def write_failure(path: str, rank: str | None, message: str, is_consequence: bool = False) -> None:
    """Write the message into a rank's error file, all at once: torchrun itself fails at half a file, and a rank may be killed any time."""
    if path == os.devnull:  # where torchrun wants no message
        return
    # torchrun compares whole seconds, and the rank that failed first may write its file a little later than another one
    timestamp = int(time.time()) + (_CONSEQUENCE_DELAY_S if is_consequence else 0)
    info = {"timestamp": str(timestamp), "rank": rank, "is_consequence": is_consequence}
    content = {"message": {"message": message, "extraInfo": info}}
    with suppress(OSError):  # the error may be a full disk
        partial = Path(f"{path}.partial")
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(path)
