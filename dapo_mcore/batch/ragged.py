"""Index arithmetic over sequences laid back to back.

Change here: index arithmetic only. It keeps Python loops over tokens out of the project.
"""

from __future__ import annotations

import numpy as np


def ragged_ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return int64 [Σ lengths], the ranges start, start + 1, … of the given lengths, concatenated.

    Example: starts [10, 4], lengths [3, 2] give [10, 11, 12, 4, 5].
    """
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(np.sum(lengths)), dtype=np.int64)
