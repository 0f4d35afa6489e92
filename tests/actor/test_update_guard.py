"""Gradient steps that are skipped, by hand-made norms, and which steps end a run."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest

from dapo_mcore.actor.update_guard import GuardState, UpdateGuard, Verdict
from dapo_mcore.config.optimizer import OptimizerConfig
from dapo_mcore.errors import TrainingError

TAKEN, NEW_LEVEL, NOT_FINITE, SPIKE = Verdict.TAKEN, Verdict.NEW_LEVEL, Verdict.NOT_FINITE, Verdict.SPIKE
EIGHT = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
"""Their median is 4.5, so with factor 2 a spike is above 9."""


def guard(limit: int = 10, **settings: float) -> UpdateGuard:
    return UpdateGuard(OptimizerConfig(max_skipped_updates=limit, **settings))


def spikes(limit: int = 4) -> UpdateGuard:
    return guard(limit, spike_factor=2.0, spike_window=8)


def judge(one: UpdateGuard, *norms: float) -> list[Verdict]:
    """Return the verdicts on gradient steps with these norms."""
    verdicts = []
    for norm in norms:
        verdicts.append(one.judge(norm))
        one.add(verdicts[-1], norm)
    return verdicts


def test_without_a_factor_only_what_is_not_finite_is_skipped_and_no_norm_is_kept() -> None:
    one = guard()
    assert judge(one, *EIGHT, 1e30, math.nan, math.inf, 0.0) == [*[TAKEN] * 9, NOT_FINITE, NOT_FINITE, TAKEN]
    assert one.state == GuardState(num_updates=12, num_not_finite=2)


def test_a_spike_is_above_the_factor_times_the_median_of_a_full_window() -> None:
    assert judge(spikes(), *EIGHT[:7], 1e9) == [TAKEN] * 8, "seven norms are too few to tell a spike"
    one = spikes()
    assert set(judge(one, *EIGHT)) == {TAKEN} and one.usual_norm == 4.5
    assert judge(one, math.nextafter(9.0, 10.0), math.nan, 9.0) == [SPIKE, NOT_FINITE, TAKEN]
    assert one.state.norms == [*EIGHT[1:], 9.0], "the oldest leaves the window; skipped steps do not enter it"
    assert (one.state.num_spikes, one.state.spikes_in_row, one.state.not_finite_in_row) == (1, 0, 0)
    assert judge(one, 0.0) == [TAKEN] and one.usual_norm == 5.5, (
        "the norm of a mini-batch without loss tokens says nothing"
    )


def test_the_last_of_too_many_spikes_in_a_row_is_the_new_level() -> None:
    """With max_skipped_updates 4, three spikes are skipped. Steps that are not finite neither count nor begin a new row."""
    one = spikes(limit=4)
    judge(one, *EIGHT)
    assert judge(one, 50.0, math.nan, 60.0, 55.0, 52.0) == [SPIKE, NOT_FINITE, SPIKE, SPIKE, NEW_LEVEL]
    assert one.state.norms == [52.0] and one.usual_norm is None
    assert judge(one, *[50.0] * 7, 101.0, 1.0) == [*[TAKEN] * 7, SPIKE, TAKEN]


def test_a_guard_that_goes_on_from_stored_state_decides_the_same() -> None:
    norms = [*EIGHT, 0.1 + 0.2, 50.0, math.nan, 51.0, 3.3, 1e4, 1e4, 1e4, 7.0, 2.0]
    whole = spikes()
    expected = judge(whole, *norms)
    for stop in range(len(norms)):
        first, second = spikes(), spikes()
        before = judge(first, *norms[:stop])
        second.state = GuardState(**asdict(first.state))
        assert before + judge(second, *norms[stop:]) == expected and second.state == whole.state


def test_a_smaller_window_after_a_resume_uses_the_newest_norms() -> None:
    one = guard(spike_factor=2.0, spike_window=8)
    one.state = GuardState(norms=[1e9, *EIGHT])
    assert one.usual_norm == 4.5


def test_steps_in_a_row_that_are_not_finite_end_the_run_at_the_limit() -> None:
    one = guard(3)
    judge(one, math.nan, math.nan, 1.0, math.nan, math.nan)
    with pytest.raises(TrainingError, match=r"last 3 gradient steps were skipped.*\(a cause\).*fewer than 3 in a row"):
        one.add(NOT_FINITE, math.nan, "a cause")
    one = spikes(limit=3)
    judge(one, *EIGHT, math.nan, 50.0, math.nan, 50.0)
    with pytest.raises(TrainingError, match=r"^3 of the last 5 \(the others were spikes\) gradient steps were skipped"):
        judge(one, math.nan)


def test_a_run_that_only_skipped_has_not_trained() -> None:
    one = guard()
    one.check_trained()  # a run without gradient steps
    judge(one, math.nan)
    with pytest.raises(TrainingError, match="all 1 gradient steps of this run were skipped"):
        one.check_trained()
    judge(one, 1.0)
    one.check_trained()


def test_a_spike_is_described_by_its_norm_and_the_usual_one() -> None:
    one = spikes()
    judge(one, *EIGHT)
    assert one.describe_spike(45.0) == "gradient norm 45 is 10 times the usual 4.5"
