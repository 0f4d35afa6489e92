"""Forecasts of how many groups are kept, against the binomial distribution's mean and standard deviation."""

from __future__ import annotations

import pytest

from dapo_mcore.rollout.sampling.forecast import groups_brought, groups_needed


@pytest.mark.parametrize(
    ("missing", "ratio"), [(1, 1.0), (2, 1.0), (7, 1.0), (1, 0.9), (2, 0.4), (64, 0.4), (512, 1 / 3)]
)
def test_the_groups_needed_are_the_fewest_that_outlast_two_standard_deviations(missing: int, ratio: float):
    def enough(n: int) -> bool:
        return n * ratio - 2 * (n * ratio * (1 - ratio)) ** 0.5 >= missing - 1e-9

    needed = groups_needed(missing, ratio)
    assert enough(needed) and not enough(needed - 1)


def test_no_group_is_needed_when_none_is_missing():
    assert groups_needed(0, 0.5) == groups_needed(-3, 0.5) == 0


@pytest.mark.parametrize(
    ("count", "ratio", "brought"),
    [(0, 0.5, 0), (2, 0.5, 2), (8, 0.5, 4 + 2 * 2**0.5), (6, 1.0, 6), (900, 1 / 3, 300 + 2 * 200**0.5)],
)
def test_groups_bring_two_standard_deviations_more_than_expected_but_never_more_than_themselves(count, ratio, brought):
    assert groups_brought(count, ratio) == pytest.approx(brought)
