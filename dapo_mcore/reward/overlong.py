"""Soft overlong penalty for responses close to the maximum length.

Change here: how length is penalised. batch/collate.py masks truncated responses out of the loss.
"""

from __future__ import annotations


def soft_overlong_penalty(length: int, max_length: int, cache: int, factor: float) -> float:
    """Return the penalty, in [-factor, 0] (paper eq. 13).

    0 up to max_length - cache tokens, then linear down to -factor at max_length and beyond. For `length` see
    OverlongConfig.count_tool_output. Example: max_length 20480, cache 4096, factor 1: 18432 tokens cost -0.5.
    """
    over = length - (max_length - cache)
    if over <= 0:
        return 0.0
    return -factor * min(over / cache, 1.0)
