"""Forecast of how many groups are kept, which decides how many to start: enough to fill the batch, but no more than
later steps can train on before they are too old.

Change here: the safety margin. refill.py decides which groups are kept and when to start more.
`ratio` is the expected share of groups that are kept. Each group is kept or not independently of the others.
"""

from __future__ import annotations

import math

_CAUTION = 2.0
"""Safety margin of a forecast, in standard deviations of the number of kept groups."""


def groups_needed(missing: int, ratio: float) -> int:
    """Return the smallest n for which `missing` of n groups are very likely kept.

    n · ratio - _CAUTION standard deviations ≥ missing. With too few groups the step waits for one more response; too
    many are surplus, which the next step trains on. Example: 2 missing at ratio 0.4 need 15.
    """
    if missing <= 0:
        return 0
    spread = _CAUTION * math.sqrt(1 - ratio)  # n · ratio = x² solves x² - spread · x = missing
    exact = ((spread + math.sqrt(spread**2 + 4 * missing)) / 2) ** 2 / ratio
    return math.ceil(exact - 1e-9)  # rounding may leave a whole number slightly too large


def groups_brought(count: int, ratio: float) -> float:
    """Return how many of `count` groups are very likely kept at most. Example: 8 at ratio 0.5 give 6.8, 2 give 2."""
    return min(count, count * ratio + _CAUTION * math.sqrt(count * ratio * (1 - ratio)))
