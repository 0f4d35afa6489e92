"""How a run ends before its time: saved and cleaned up exactly once, undisturbed, and quietly where a signal ended it.

Change here: which signals end a run, what the first and a second one do, and how long the main thread may take to notice
one. What is saved then is train/loop.py; what the process says and returns is exit_status.py.

    `nothing_begun`      the start: a signal ends the process at once
    outside `deferred`   a signal ends the run at once
    inside               the first signal asks the run to stop: what `until_asked` runs is interrupted, everything else is
                         finished; a second signal ends the run at once
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FrameType, TracebackType
from typing import Any, TypeVar

from dapo_mcore.errors import DapoError, OtherRankFailed

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NOTICE_S = 10.0
"""torchrun kills whatever is left 30 s after it has passed a signal on."""
SAME_S = 2.0
"""Signals this soon after the first are the first: Slurm and terminals signal torchrun and its ranks, and torchrun then
passes its own signal on."""
_LOOK_S = 0.5
_RESEND_S = 0.1


class Interrupted(KeyboardInterrupt):
    """The signal `signum` ended the run."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def status(self) -> int:
        """The exit status by which shells tell such an end."""
        return 128 + self.signum


@contextmanager
def nothing_begun() -> Iterator[None]:
    """Let a signal inside the block, in which nothing is made that must be saved or cleaned up, end the process at once: on
    rank 0 with one line and status 128 + n, elsewhere as if nobody listened."""

    def hear(signum: int) -> None:
        name = signal.Signals(signum).name
        print(f"stopped by {name} before the first step; nothing to save", file=sys.stderr, flush=True)
        os._exit(Interrupted(signum).status)

    listens = os.environ.get("RANK", "0") == "0" and _in_main_thread()
    stop = _listen(lambda *_: None, hear) if listens else lambda: None
    try:
        yield
    finally:
        stop()


class Ending:
    """A block on rank 0 after which `cleanup` runs, however the block ends, while further signals change nothing.

    farewell  Return a line for standard error. Called after a signal, when all is clean.

    A signal that ends the run at once raises Interrupted in the main thread, and whatever error follows leaves the block as
    Interrupted. If the main thread does not leave the block within NOTICE_S (it may wait in a library for ranks that are
    gone), another thread cleans up and ends the process. Outside the main thread signals are left alone.
    """

    def __init__(self, farewell: Callable[[], str]):
        self.cleanup = ExitStack()
        self.signum: int | None = None
        self._farewell = farewell
        self._begun, self._once = threading.Event(), threading.Lock()
        self._heard_at: float | None = None
        self._deferred = self._interruptible = self._raised = False
        self._notice: Callable[[], str] = str
        self._stop_listening: Callable[[], None] = lambda: None

    def __enter__(self) -> Ending:
        if _in_main_thread():
            stop = _listen(self._on_signal, self._hear)
            hook_before, sys.unraisablehook = sys.unraisablehook, partial(self._on_unraisable, sys.unraisablehook)
            self._stop_listening = lambda: (stop(), setattr(sys, "unraisablehook", hook_before))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._begun.set()
        with self._once:
            try:
                self._finish(error)
            finally:
                self._stop_listening()
        if self.signum is not None:
            raise Interrupted(self.signum) from None

    @contextmanager
    def deferred(self, notice: Callable[[], str]) -> Iterator[None]:
        """Let the first signal inside the block only ask the run to stop, and raise Interrupted where the block ends.

        notice  Return what to say when that signal arrives.
        """
        self._notice, self._deferred = notice, True
        try:
            yield
        finally:
            self._deferred = False
        if self.signum is not None:
            raise Interrupted(self.signum)

    def until_asked(self, action: Callable[[], T]) -> T | None:
        """Return `action()`, or None if a signal has asked the run to stop: it interrupts the action."""
        try:
            try:
                self._interruptible = True
                return None if self._deferred and self.signum is not None else action()
            finally:
                self._interruptible = False
        except Interrupted:
            if not self._deferred:
                raise
            self._raised = False
            return None

    def end_now(self, why: str) -> None:
        """Clean up and end the process with status 1, from a thread beside the main one."""
        with self._once:
            if not self._begun.is_set():
                try:
                    self.cleanup.close()
                    print(f"{why}: {self._farewell()}", file=sys.stderr, flush=True)
                finally:
                    os._exit(1)

    def _finish(self, error: BaseException | None = None) -> None:
        self.cleanup.close()
        if self.signum is None:
            return
        if isinstance(error, DapoError) and not isinstance(error, OtherRankFailed):
            print(f"error: {error}", file=sys.stderr)  # the signal hides it from exit_status
        print(f"stopped by {signal.Signals(self.signum).name}: {self._farewell()}", file=sys.stderr, flush=True)

    def _on_signal(self, signum: int, _: FrameType | None) -> None:
        """In the main thread, between two of its steps."""
        if self._begun.is_set():
            return
        self.signum = self.signum or signum
        if not self._raised and (self._interruptible or not self._deferred):
            self._raised = True
            raise Interrupted(self.signum)

    def _on_unraisable(self, before: Callable[[Any], None], ignored: Any) -> None:
        """Python ignores exceptions raised in a finalizer, and the main thread may have been inside one."""
        if isinstance(ignored.exc_value, Interrupted):
            self._raised = False
            threading.Timer(_RESEND_S, os.kill, (os.getpid(), ignored.exc_value.signum)).start()
        else:
            before(ignored)

    def _hear(self, signum: int) -> None:
        """In a thread of its own, at once, whatever the main thread is doing."""
        first = self._heard_at is None
        if first:
            self._heard_at = time.monotonic()
        if self._deferred and first:
            print(f"{signal.Signals(signum).name}: {self._notice()}", file=sys.stderr, flush=True)
        elif not self._deferred or time.monotonic() - self._heard_at > SAME_S:
            self._end_soon(signum)

    def _end_soon(self, signum: int) -> None:
        self._deferred = False
        end = time.monotonic() + NOTICE_S
        while not self._begun.wait(_LOOK_S) and time.monotonic() < end:
            # the main thread may have put it off already, or have begun to sleep just before it could handle it
            os.kill(os.getpid(), signum)
        with self._once:
            if not self._begun.is_set():
                self.signum = self.signum or signum
                try:
                    self._finish()
                finally:
                    os._exit(Interrupted(self.signum).status)


class Following:
    """The same block on other ranks, which have nothing to clean up: a signal ends the process as if nobody listened.

    leader  the process id of rank 0 where it is on this machine.

    Inside `deferred` the first signal is rank 0's business, which tells all ranks to stop. A second one ends the process,
    and so does the end of rank 0: torchrun signals the others when a rank fails.
    """

    def __init__(self, leader: int | None = None):
        self._leader = leader
        self.signum: int | None = None

    def __enter__(self) -> Following:
        return self

    def __exit__(self, *_: object) -> None: ...

    @contextmanager
    def deferred(self, notice: Callable[[], str]) -> Iterator[None]:
        """Leave the first signal inside the block to rank 0."""
        heard_at: list[float] = []

        def hear(signum: int) -> None:
            if not heard_at:
                heard_at.append(time.monotonic())
                threading.Thread(target=self._watch_leader, args=(signum,), name="leader", daemon=True).start()
            elif time.monotonic() - heard_at[0] > SAME_S:
                os._exit(Interrupted(signum).status)

        stop = _listen(lambda *_: None, hear) if _in_main_thread() else lambda: None
        try:
            yield
        finally:
            stop()

    def until_asked(self, action: Callable[[], T]) -> T | None:
        """Return `action()`."""
        return action()

    def end_now(self, why: str) -> None:
        """End the process with status 1, a little after rank 0, which says why."""
        time.sleep(SAME_S)
        os._exit(1)

    def _watch_leader(self, signum: int) -> None:
        while self._leader is not None:
            try:
                os.kill(self._leader, 0)
            except ProcessLookupError:
                os._exit(Interrupted(signum).status)
            time.sleep(_LOOK_S)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _listen(on_signal: Callable[[int, FrameType | None], None], hear: Callable[[int], None]) -> Callable[[], None]:
    """Call `on_signal` in the main thread and `hear` in another for each of SIGNALS; return what undoes it.

    A signal that is ignored, as after nohup, stays so. Must be called in the main thread.
    """
    handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, on_signal) for number in handled}
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    wakeup_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_read_signals, args=(reader, hear), name="ending", daemon=True).start()
    listening = [True]
    os.register_at_fork(after_in_child=lambda: _forget(handled) if listening else None)

    def undo() -> None:
        listening.clear()
        signal.set_wakeup_fd(wakeup_before)
        os.close(writer)
        for number, handler in before.items():
            signal.signal(number, handler)

    return undo


def _read_signals(reader: int, hear: Callable[[int], None]) -> None:
    """A signal's number arrives here at once, whatever the main thread is doing."""
    while number := os.read(reader, 1):
        if number[0] in SIGNALS:
            hear(number[0])
    os.close(reader)


def _forget(handled: Sequence[int]) -> None:
    """In a forked child, whose signals would arrive at its parent's thread."""
    signal.set_wakeup_fd(-1)
    for number in handled:
        signal.signal(number, signal.SIG_DFL)
