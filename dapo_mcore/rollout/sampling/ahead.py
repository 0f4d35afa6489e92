"""Work for the next step during the training of this one: one thread, one step ahead.

Change here: how the controller's background thread is started and waited for. What it does is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import Generic, TypeVar

T = TypeVar("T")
_LOOK_S = 0.2


class Ahead(Generic[T]):
    """Holds at most one result of `work(step)`, from `begin` until `take`."""

    def __init__(self, work: Callable[[int], T]):
        self._work = work
        self._step: int | None = None
        self._future: Future[T] = Future()

    @property
    def running(self) -> bool:
        return self._step is not None and not self._future.done()

    def begin(self, step: int) -> None:
        """Start `work(step)` in a daemon thread: it does not keep a failing process alive."""
        assert self._step is None, f"step {self._step} was not taken yet"
        self._step, self._future = step, Future()
        Thread(target=self._run, args=(step, self._future), name="rollout-ahead", daemon=True).start()

    def wait(self, unless: Callable[[], bool] = lambda: False) -> None:
        """Wait until no work is running, or `unless()` is True; it is asked every _LOOK_S seconds.

        Does not raise what the work raises; `take` does.
        """
        while self.running and not unless():
            wait([self._future], _LOOK_S)

    def take(self, step: int) -> T | None:
        """Wait for the result of `step` and return it, or None if it was not begun. Raise what the work raises."""
        if self._step is None:
            return None
        assert self._step == step, f"step {self._step} was begun, but {step} is asked for"
        self._step, future, self._future = None, self._future, Future()  # keep nothing of what it holds
        return future.result()

    def _run(self, step: int, future: Future[T]) -> None:
        try:
            future.set_result(self._work(step))
        except BaseException as error:  # whoever waits must learn of it, whatever it is
            future.set_exception(error)
