"""Phase times on a clock that the test moves."""

from __future__ import annotations

import pytest

from dapo_mcore.observe.timing import PhaseTimer


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_repeated_phases_add_up_and_the_rest_counts_only_in_the_step() -> None:
    clock = Clock()
    timer = PhaseTimer(clock)
    for seconds in (2.0, 3.0):
        with timer.phase("generate"):
            clock.now += seconds
        clock.now += 0.5
    assert timer.pop() == {"time/generate_s": 5.0, "time/step_s": 6.0}


def test_nested_time_belongs_to_the_inner_phase() -> None:
    clock = Clock()
    timer = PhaseTimer(clock)
    with timer.phase("generate"):
        clock.now += 1.0
        with timer.phase("reward"):
            clock.now += 4.0
        with timer.phase("generate"):
            clock.now += 2.0
        clock.now += 1.0
    assert timer.pop() == {"time/generate_s": 4.0, "time/reward_s": 4.0, "time/step_s": 8.0}


def test_pop_starts_anew_even_inside_a_phase() -> None:
    clock = Clock()
    timer = PhaseTimer(clock)
    with timer.phase("sync"):
        clock.now += 1.0
        assert timer.pop() == {"time/sync_s": 1.0, "time/step_s": 1.0}
        clock.now += 2.0
    clock.now += 1.0
    assert timer.pop() == {"time/sync_s": 2.0, "time/step_s": 3.0}
    assert timer.pop() == {"time/step_s": 0.0}


def test_start_evaluation_and_saving_are_not_part_of_a_step() -> None:
    clock = Clock()
    timer = PhaseTimer(clock)
    for name, seconds in (("start", 30.0), ("generate", 2.0), ("train", 3.0), ("eval", 10.0), ("save", 4.0)):
        with timer.phase(name):  # type: ignore[arg-type]
            clock.now += seconds
        clock.now += 0.5
    times = timer.pop()
    assert times["time/step_s"] == 2.0 + 3.0 + 5 * 0.5
    assert (times["time/start_s"], times["time/eval_s"], times["time/save_s"]) == (30.0, 10.0, 4.0)


def test_a_phase_that_raises_is_charged_and_closed() -> None:
    clock = Clock()
    timer = PhaseTimer(clock)
    with pytest.raises(KeyError), timer.phase("train"):
        clock.now += 3.0
        raise KeyError
    clock.now += 1.0
    assert timer.pop() == {"time/train_s": 3.0, "time/step_s": 4.0}


def test_an_unknown_phase_is_a_programming_error() -> None:
    with pytest.raises(AssertionError, match="generate, reward"), PhaseTimer().phase("nap"):  # type: ignore[arg-type]
        pass
