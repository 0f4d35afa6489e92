"""Waits that look after something meanwhile."""

from __future__ import annotations

from concurrent.futures import Future
from queue import SimpleQueue

import pytest

from dapo_mcore.rollout.sampling.tending import get_tending, wait_tending


def test_a_future_is_waited_for_until_it_is_done_or_the_tending_says_so():
    done: Future[int] = Future()
    wait_tending(done, tend=lambda: done.set_result(1))
    assert done.result() == 1
    wait_tending(done, tend=lambda: pytest.fail("it was done already"))
    wait_tending(never := Future(), tend=lambda: True)
    assert not never.done()


def test_an_item_is_waited_for_and_what_the_tending_raises_ends_the_wait():
    queue: SimpleQueue[str] = SimpleQueue()
    assert get_tending(queue, tend=lambda: queue.put("item")) == "item"

    def fail() -> None:
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        get_tending(queue, tend=fail)
