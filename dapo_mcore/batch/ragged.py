"""Index arithmetic over sequences laid back to back.

Change here: nothing of policy; this replaces Python lists per token by one vectorised gather.
"""

from __future__ import annotations

import numpy as np


def ragged_ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64 [Σ lengths], the ranges start, start + 1, … of each length, concatenated.

    Example: starts [10, 4], lengths [3, 2] give [10, 11, 12, 4, 5].
    """
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(np.sum(lengths)), dtype=np.int64)
