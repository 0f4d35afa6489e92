"""How many groups to begin: enough to fill the batch, and no more than later steps can train on in time.

Change here: how much luck is allowed for. Which groups count, and what is done about them, is refill.py.
`ratio` everywhere is the share of groups that is expected to be kept, each by its own luck.
"""

from __future__ import annotations

import math

_CAUTION = 2.0
"""Standard deviations of luck, bad or good, that a forecast outlasts."""


def groups_needed(missing: int, ratio: float) -> int:
    """The fewest groups n of which `missing` are kept, unless luck is bad: n · ratio - _CAUTION standard deviations ≥ missing.

    Groups too few cost another response's time at the end of the step; groups too many are surplus, which the next step
    trains on. Example: 2 missing at ratio 0.4 need 15.
    """
    if missing <= 0:
        return 0
    spread = _CAUTION * math.sqrt(1 - ratio)  # n · ratio = x² solves x² - spread · x = missing
    exact = ((spread + math.sqrt(spread**2 + 4 * missing)) / 2) ** 2 / ratio
    return math.ceil(exact - 1e-9)  # the root of a whole number, squared, may be a hair above it


def groups_brought(count: int, ratio: float) -> float:
    """The most of `count` groups that are kept, unless luck is good. Example: 8 at ratio 0.5 bring 6.8, 2 bring 2."""
    return min(count, count * ratio + _CAUTION * math.sqrt(count * ratio * (1 - ratio)))
