"""Soft overlong punishment: a response pays for the last stretch before the maximal length.

Change here: how length is punished. Masking truncated responses out of the loss is algo's business.
"""

from __future__ import annotations


def soft_overlong_penalty(length: int, max_length: int, cache: int, factor: float) -> float:
    """The penalty, in [-factor, 0] (paper eq. 13).

    0 up to max_length - cache tokens, then linear down to -factor at max_length and beyond. `length` counts every
    response token, tool output too. Example: max_length 20480, cache 4096, factor 1: 18432 tokens cost -0.5.
    """
    over = length - (max_length - cache)
    if over <= 0:
        return 0.0
    return -factor * min(over / cache, 1.0)
