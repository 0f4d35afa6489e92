"""One step of work in a thread: its result, or its failure, is handed over once."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import pytest

from dapo_mcore.errors import RolloutError
from dapo_mcore.rollout.sampling.ahead import Ahead


def test_the_result_is_handed_over_once_and_only_for_its_step():
    go = threading.Event()

    def work(step: int) -> tuple[int, str]:
        assert go.wait(10)
        return step, threading.current_thread().name

    ahead = Ahead(work)
    assert ahead.take(1) is None and not ahead.running
    ahead.begin(2)
    assert ahead.running
    with pytest.raises(AssertionError, match="step 2 was not taken"):
        ahead.begin(3)
    with pytest.raises(AssertionError, match="step 2 was begun, but 3 is asked for"):
        ahead.take(3)
    go.set()
    ahead.wait()
    assert not ahead.running
    assert ahead.take(2) == (2, "rollout-ahead")
    assert ahead.take(3) is None


def test_a_result_that_was_taken_is_not_kept():
    ahead = Ahead(lambda step: np.zeros(step))
    ahead.begin(1)
    taken = weakref.ref(ahead.take(1))
    assert taken() is None


def test_a_wait_ends_early_when_it_is_told_to():
    go = threading.Event()
    ahead = Ahead(lambda step: go.wait(10))
    ahead.wait(unless=lambda: pytest.fail("nothing is running"))
    ahead.begin(1)
    ahead.wait(unless=lambda: True)
    assert ahead.running
    go.set()
    assert ahead.take(1)


def test_a_failure_is_raised_when_the_result_is_taken():
    def fail(step: int) -> None:
        raise RolloutError(f"step {step} is broken")

    ahead = Ahead(fail)
    ahead.begin(5)
    ahead.wait()
    with pytest.raises(RolloutError, match="step 5 is broken"):
        ahead.take(5)
    assert ahead.take(6) is None
