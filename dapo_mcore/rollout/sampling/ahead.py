"""Work for the next step beside the training of this one: one thread, one step ahead.

Change here: how the controller's background thread is started and waited for. What it does is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Generic, TypeVar

from dapo_mcore.rollout.sampling.tending import wait_tending

T = TypeVar("T")


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
        """Starts `work(step)` in a thread, which does not keep a failing process alive."""
        assert self._step is None, f"step {self._step} was not taken yet"
        self._step, self._future = step, Future()
        Thread(target=self._run, args=(step, self._future), name="rollout-ahead", daemon=True).start()

    def wait(self, tend: Callable[[], bool | None]) -> None:
        """Returns once the work that was begun, if any, has ended, or `tend` says True; `take` tells how it ended."""
        if self._step is not None:
            wait_tending(self._future, tend)

    def take(self, step: int) -> T | None:
        """The result for `step` once it is there, None when it was not begun. Raises what the work raised."""
        if self._step is None:
            return None
        assert self._step == step, f"step {self._step} was begun, but {step} is asked for"
        self._step = None
        return self._future.result()

    def _run(self, step: int, future: Future[T]) -> None:
        try:
            future.set_result(self._work(step))
        except BaseException as error:  # whoever waits must hear of it, whatever it is
            future.set_exception(error)
