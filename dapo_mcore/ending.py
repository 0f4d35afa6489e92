"""How a run ends before its time: cleaned up exactly once, undisturbed, and quietly where a signal ended it.

Change here: which signals end a run, and how long the main thread may take to notice one. What the process then says and
returns is exit_status.py.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NOTICE_S = 10.0
"""torchrun kills whatever is left 30 s after it has passed a signal on."""
_LOOK_S = 0.1


class Interrupted(KeyboardInterrupt):
    """The signal `signum` ended the run."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def status(self) -> int:
        """The exit status by which shells tell such an end."""
        return 128 + self.signum


class Ending:
    """A block after which `clean` is called, however it ends, while further signals change nothing.

    farewell  a line for standard error after a signal, asked for when all is clean.

    The first of SIGNALS raises Interrupted in the main thread, and whatever error that leads to leaves the block as
    Interrupted. Where the main thread does not come to its end within NOTICE_S, because it waits in a library for ranks
    that are gone, say, another thread does what is left and ends the process. Outside the main thread signals are left
    alone.
    """

    def __init__(self, farewell: Callable[[], str]):
        self.clean: Callable[[], None] = lambda: None
        self.signum: int | None = None
        self._farewell = farewell
        self._begun, self._once = threading.Event(), threading.Lock()
        self._lost = False
        self._stop_listening: Callable[[], None] = lambda: None

    def __enter__(self) -> Ending:
        if threading.current_thread() is threading.main_thread():
            self._stop_listening = self._listen()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._begun.set()
        with self._once:
            try:
                self._finish()
            finally:
                self._stop_listening()
        if self.signum is not None:
            raise Interrupted(self.signum) from None

    def _finish(self) -> None:
        self.clean()
        if self.signum is not None:
            print(f"stopped by {signal.Signals(self.signum).name}: {self._farewell()}", file=sys.stderr, flush=True)

    def _listen(self) -> Callable[[], None]:
        """What undoes it. Who has a signal ignored, as nohup does, keeps it so."""
        handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._on_signal) for number in handled}
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        wakeup_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        hook_before, sys.unraisablehook = sys.unraisablehook, partial(self._on_unraisable, sys.unraisablehook)
        threading.Thread(target=self._watch, args=(reader,), name="ending", daemon=True).start()
        listening = [True]
        os.register_at_fork(after_in_child=lambda: _forget(handled) if listening else None)

        def undo() -> None:
            listening.clear()
            sys.unraisablehook = hook_before
            signal.set_wakeup_fd(wakeup_before)
            os.close(writer)
            for number, handler in before.items():
                signal.signal(number, handler)

        return undo

    def _on_signal(self, signum: int, _: FrameType | None) -> None:
        if self.signum is None and not self._begun.is_set():
            self.signum = signum
            raise Interrupted(signum)

    def _on_unraisable(self, before: Callable[[Any], None], ignored: Any) -> None:
        """Python ignores what is raised in a finalizer, which may be what the main thread was in."""
        if isinstance(ignored.exc_value, Interrupted):
            self._lost = True
        else:
            before(ignored)

    def _watch(self, reader: int) -> None:
        """A signal's number arrives here at once, whatever the main thread is doing."""
        while number := os.read(reader, 1):
            if number[0] in SIGNALS and not self._wait_for_main(number[0]):
                self._end_for_main(number[0])
        os.close(reader)

    def _wait_for_main(self, signum: int) -> bool:
        """Whether the main thread comes to the end of the block in time."""
        end = time.monotonic() + NOTICE_S
        while not self._begun.wait(_LOOK_S) and time.monotonic() < end:
            if self._lost:
                self._lost, self.signum = False, None
                os.kill(os.getpid(), signum)
        return self._begun.is_set()

    def _end_for_main(self, signum: int) -> None:
        with self._once:
            if self._begun.is_set():  # it came at the last moment
                return
            self.signum = signum
            try:
                self._finish()
            finally:
                os._exit(Interrupted(signum).status)


def _forget(handled: Sequence[int]) -> None:
    """In a forked child, whose signals would arrive at its parent's thread."""
    signal.set_wakeup_fd(-1)
    for number in handled:
        signal.signal(number, signal.SIG_DFL)
