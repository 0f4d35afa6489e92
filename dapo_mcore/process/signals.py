"""Early end of a run: it is saved and cleaned up exactly once, and a run that a signal ended shows no traceback.

Change here: which signals end a run, what the first and the second one do, and how long the main thread may take to react.
What is saved is decided in train/outputs.py; exit_status.py turns the end into a message and an exit status.

    `exit_on_signal`          during the start: a signal ends the process at once
    outside `defer_signals`   a signal ends the run at once
    inside `defer_signals`    the first signal asks the run to stop: it interrupts what runs in `run_interruptible`, and all
                              other work is finished; a second signal ends the run at once. `request_stop` asks without a
                              signal (see stop_file.py)
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import FrameType, TracebackType
from typing import Any, NamedTuple, TypeVar

from dapo_mcore.errors import DapoError, OtherRankFailed

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_WAKE = signal.SIGUSR2
"""Wakes the main thread of this process for `request_stop`. No other process sends it."""
MAIN_THREAD_TIMEOUT_S = 10.0
"""The main thread must react to a signal within this time. torchrun kills all ranks 30 s after it passes a signal on."""
REPEAT_S = 2.0
"""A signal this soon after the first one is a repeat of it, not a second one: Slurm and terminals signal torchrun and its
ranks, and torchrun then passes its own signal on."""
POLL_S = 0.5
_RESEND_S = 0.1


class Interrupted(KeyboardInterrupt):
    """The signal `signum` ended the run."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def status(self) -> int:
        """The exit status that shells use for this signal: 128 + signum."""
        return 128 + self.signum


class Stop(NamedTuple):
    """What has asked a run to stop: the signal `signum`, or with None a request without a signal."""

    signum: int | None


@contextmanager
def exit_on_signal() -> Iterator[None]:
    """Let a signal inside the block end the process at once. Use it while there is nothing to save or clean up.

    Rank 0 prints one line and exits with status 128 + signum. Other ranks keep Python's own handlers.
    """

    def exit_at_once(signum: int) -> None:
        name = signal.Signals(signum).name
        print(f"stopped by {name} before the first step; nothing to save", file=sys.stderr, flush=True)
        os._exit(Interrupted(signum).status)

    is_controller = os.environ.get("RANK", "0") == "0"
    uninstall = _install(lambda *_: None, exit_at_once) if is_controller and _in_main_thread() else lambda: None
    try:
        yield
    finally:
        uninstall()


class ControllerShutdown:
    """A block on rank 0 that runs `cleanup` exactly once, however the block ends; later signals do not disturb it.

    closing_line  Return the line for standard error after a signal. Called when all is cleaned up.
    neighbours    process ids of this machine's ranks. When one fails, torchrun signals the others: a signal is deferred only as
                  long as all of them live.

    A signal that ends the run at once raises Interrupted in the main thread. Any error that follows from it leaves the block
    as Interrupted. The main thread may be stuck in a library that waits for lost ranks: if it does not leave the block within
    MAIN_THREAD_TIMEOUT_S, another thread cleans up and ends the process. Outside the main thread the block handles no
    signals.
    """

    def __init__(self, closing_line: Callable[[], str], neighbours: Sequence[int] = ()):
        self.cleanup = ExitStack()
        self._neighbours = neighbours
        self.signum: int | None = None
        self._stop_requested = False
        self._closing_line = closing_line
        self._cleanup_started, self._cleanup_lock = threading.Event(), threading.Lock()
        self._first_signal_at: float | None = None
        self._notified = threading.Event()
        self._deferred = self._interruptible = self._raised = False
        self._notice: Callable[[], str] = str
        self._uninstall: Callable[[], None] = lambda: None

    def __enter__(self) -> ControllerShutdown:
        if _in_main_thread():
            uninstall = _install(self._handle_in_main_thread, self._handle_in_signal_thread)
            wake_before = signal.signal(_WAKE, self._wake)
            hook_before, sys.unraisablehook = sys.unraisablehook, partial(self._on_unraisable, sys.unraisablehook)
            self._uninstall = lambda: (
                uninstall(),
                signal.signal(_WAKE, wake_before),
                setattr(sys, "unraisablehook", hook_before),
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._cleanup_started.set()
        with self._cleanup_lock:
            try:
                self._clean_up(error)
            finally:
                self._uninstall()
        if self.signum is not None:
            raise Interrupted(self.signum) from None

    @property
    def stop(self) -> Stop | None:
        """What has asked the run to stop so far; a signal counts before a request without one."""
        return Stop(self.signum) if self.signum is not None or self._stop_requested else None

    def request_stop(self) -> None:
        """Ask the run to stop, as the first signal inside `defer_signals` does, but at any time and from any thread. Nothing is
        raised: the caller of `stop` ends the run."""
        self._stop_requested = True
        if self._deferred and self._interruptible:
            signal.pthread_kill(threading.main_thread().ident, _WAKE)

    @contextmanager
    def defer_signals(self, notice: Callable[[], str]) -> Iterator[None]:
        """Let the first signal inside the block only ask the run to stop. Raise Interrupted at the end of the block.

        notice  Return the line to print when that signal arrives.
        """
        self._notice, self._deferred = notice, True
        try:
            yield
        finally:
            if self.signum is not None:
                self._notified.wait(POLL_S)  # the other thread must see that the signal was deferred
            self._deferred = False
        if self.signum is not None:
            raise Interrupted(self.signum)

    def run_interruptible(self, action: Callable[[], T]) -> T | None:
        """Return `action()`. Return None if the run is asked to stop: a running action is interrupted, and a new one does not
        start."""
        try:
            try:
                self._interruptible = True
                return None if self._deferred and self.stop else action()
            finally:
                self._interruptible = False
        except Interrupted:
            if not self._deferred:
                raise
            self._raised = False
            return None

    def abort(self, reason: str) -> None:
        """Clean up, print the reason and end the process with status 1. Called from another thread than the main one."""
        with self._cleanup_lock:
            if not self._cleanup_started.is_set():
                try:
                    self.cleanup.close()
                    print(f"{reason}: {self._closing_line()}", file=sys.stderr, flush=True)
                finally:
                    os._exit(1)

    def _clean_up(self, error: BaseException | None = None) -> None:
        """Run the cleanup. After a signal, print the block's error, if a user can mend it, and the closing line."""
        self.cleanup.close()
        if self.signum is None:
            return
        if isinstance(error, DapoError) and not isinstance(error, OtherRankFailed):
            print(f"error: {error}", file=sys.stderr)  # exit_status sees Interrupted instead of it
        print(f"stopped by {signal.Signals(self.signum).name}: {self._closing_line()}", file=sys.stderr, flush=True)

    def _handle_in_main_thread(self, signum: int, _: FrameType | None) -> None:
        """Raise Interrupted where the signal may interrupt. Python calls this between two instructions of the main thread."""
        if self._cleanup_started.is_set():
            return
        self.signum = self.signum or signum
        if not self._raised and (self._interruptible or not self._deferred):
            self._raised = True
            raise Interrupted(self.signum)

    def _wake(self, signum: int, _: FrameType | None) -> None:
        if self._deferred and self._interruptible and not self._raised:
            self._raised = True
            raise Interrupted(signum)

    def _on_unraisable(self, before: Callable[[Any], None], ignored: Any) -> None:
        """Send the signal again: Python ignores exceptions raised in a finalizer, and the main thread may have been in one."""
        if isinstance(ignored.exc_value, Interrupted):
            self._raised = False
            threading.Timer(_RESEND_S, os.kill, (os.getpid(), ignored.exc_value.signum)).start()
        else:
            before(ignored)

    def _handle_in_signal_thread(self, signum: int) -> None:
        """Print the notice of the first signal, or end the run. Called at once, whatever the main thread is doing."""
        is_first = self._first_signal_at is None
        if is_first:
            self._first_signal_at = time.monotonic()
        if self._deferred and is_first:
            print(f"{signal.Signals(signum).name}: {self._notice()}", file=sys.stderr, flush=True)
            self._notified.set()
            _when_one_ends(self._neighbours, lambda: self._deferred and self._end_run(signum))
        elif not self._deferred or time.monotonic() - self._first_signal_at > REPEAT_S:
            self._end_run(signum)

    def _end_run(self, signum: int) -> None:
        """Signal the main thread until it leaves the block. At the timeout, clean up here and end the process."""
        self._deferred = False
        deadline = time.monotonic() + MAIN_THREAD_TIMEOUT_S
        while not self._cleanup_started.wait(POLL_S) and time.monotonic() < deadline:
            # the main thread may have deferred the signal before, or have fallen asleep just before it could handle it
            os.kill(os.getpid(), signum)
        with self._cleanup_lock:
            if not self._cleanup_started.is_set():
                self.signum = self.signum or signum
                try:
                    self._clean_up()
                finally:
                    os._exit(Interrupted(self.signum).status)


class WorkerShutdown:
    """The same block on the other ranks. A signal ends the process as by default; `cleanup` runs if the block ends otherwise.

    neighbours  process ids of this machine's ranks, this one included.

    Inside `defer_signals` the first signal does nothing here: rank 0 tells all ranks to stop. A second signal ends the
    process, and so does the end of a neighbour: when a rank fails, torchrun signals the others of its machine, and they
    cannot save without it.
    """

    def __init__(self, neighbours: Sequence[int] = ()):
        self.cleanup = ExitStack()
        self._neighbours = neighbours
        self.stop: Stop | None = None

    def __enter__(self) -> WorkerShutdown:
        return self

    def __exit__(self, *_: object) -> None:
        self.cleanup.close()

    @contextmanager
    def defer_signals(self, notice: Callable[[], str]) -> Iterator[None]:
        """Leave the first signal inside the block to rank 0."""
        first_signal_at: list[float] = []

        def handle(signum: int) -> None:
            if not first_signal_at:
                first_signal_at.append(time.monotonic())
                _when_one_ends(self._neighbours, lambda: os._exit(Interrupted(signum).status))
            elif time.monotonic() - first_signal_at[0] > REPEAT_S:
                os._exit(Interrupted(signum).status)

        uninstall = _install(lambda *_: None, handle) if _in_main_thread() else lambda: None
        try:
            yield
        finally:
            uninstall()

    def run_interruptible(self, action: Callable[[], T]) -> T | None:
        """Return `action()`."""
        return action()

    def abort(self, reason: str) -> None:
        """End the process with status 1, a little after rank 0 has printed the reason."""
        time.sleep(REPEAT_S)
        os._exit(1)


def _when_one_ends(processes: Sequence[int], action: Callable[[], None]) -> None:
    """Call `action` in a thread once one of the processes has ended and its parent knows it."""

    def watch() -> None:
        with suppress(ProcessLookupError):
            while True:
                for process in processes:
                    os.kill(process, 0)
                time.sleep(POLL_S)
        action()

    threading.Thread(target=watch, name="neighbours", daemon=True).start()


Shutdown = ControllerShutdown | WorkerShutdown


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _install(
    in_main_thread: Callable[[int, FrameType | None], None], in_signal_thread: Callable[[int], None]
) -> Callable[[], None]:
    """Call both handlers for each of SIGNALS, one in the main thread and one in a thread for signals. Return a function that
    restores the handlers of before.

    A signal that is ignored, as after nohup, stays ignored. Must be called in the main thread.
    """
    handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, in_main_thread) for number in handled}
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    wakeup_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_read_signals, args=(reader, in_signal_thread), name="signals", daemon=True).start()
    installed = [True]
    os.register_at_fork(after_in_child=lambda: _use_default_handlers(handled) if installed else None)

    def uninstall() -> None:
        installed.clear()
        signal.set_wakeup_fd(wakeup_before)
        os.close(writer)
        for number, handler in before.items():
            signal.signal(number, handler)

    return uninstall


def _read_signals(reader: int, handle: Callable[[int], None]) -> None:
    """Call `handle` for each signal number in the pipe. The number arrives at once, whatever the main thread is doing."""
    while number := os.read(reader, 1):
        if number[0] in SIGNALS:
            handle(number[0])
    os.close(reader)


def _use_default_handlers(handled: Sequence[int]) -> None:
    """Reset the handlers in a forked child. Its signals would otherwise arrive in its parent's thread."""
    signal.set_wakeup_fd(-1)
    for number in handled:
        signal.signal(number, signal.SIG_DFL)
