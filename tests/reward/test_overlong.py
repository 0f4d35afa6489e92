"""Paper eq. 13 with the paper's numbers, and its limits."""

from __future__ import annotations

import math

import pytest

from dapo_mcore.reward.overlong import soft_overlong_penalty


@pytest.mark.parametrize(
    ("length", "penalty"),
    [(0, 0.0), (16384, 0.0), (16385, -1 / 4096), (18432, -0.5), (20479, -4095 / 4096), (20480, -1.0), (30000, -1.0)],
)
def test_the_papers_numbers(length: int, penalty: float):
    assert soft_overlong_penalty(length, max_length=20480, cache=4096, factor=1.0) == penalty


def test_the_factor_scales_slope_and_floor():
    assert soft_overlong_penalty(14, max_length=16, cache=8, factor=0.5) == -0.375
    assert soft_overlong_penalty(99, max_length=16, cache=8, factor=0.5) == -0.5


def test_a_cache_as_wide_as_the_limit_starts_at_the_first_token():
    assert [soft_overlong_penalty(n, max_length=4, cache=4, factor=1.0) for n in (0, 1, 4)] == [0.0, -0.25, -1.0]


def test_no_penalty_is_positive_zero():
    assert math.copysign(1, soft_overlong_penalty(8, max_length=16, cache=8, factor=1.0)) == 1.0
