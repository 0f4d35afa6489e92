"""Waiting for responses, while somebody must look after those who make them.

Change here: how often. What there is to look after is the engine's `tend` (types.ContinuousEngine).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
_TEND_S = 0.2


def wait_tending(future: Future[Any], tend: Callable[[], bool | None]) -> None:
    """Returns once `future` is done, or `tend`, which is called every _TEND_S seconds, says True."""
    while not wait([future], _TEND_S).done and not tend():
        pass


def get_tending(queue: SimpleQueue[T], tend: Callable[[], None]) -> T:
    """The next item of `queue`. Calls `tend` every _TEND_S seconds."""
    while True:
        try:
            return queue.get(timeout=_TEND_S)
        except Empty:
            tend()
