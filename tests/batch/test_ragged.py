"""Concatenated ranges."""

import numpy as np

from dapo_mcore.batch.ragged import ragged_ranges


def test_ranges_of_any_length_in_any_order():
    result = ragged_ranges(np.array([10, 4, 7, 0]), np.array([3, 2, 0, 1]))
    assert result.tolist() == [10, 11, 12, 4, 5, 0]


def test_nothing():
    empty = np.zeros(0, np.int64)
    assert ragged_ranges(empty, empty).tolist() == []
