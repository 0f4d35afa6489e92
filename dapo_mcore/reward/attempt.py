"""One response to score and what came of it, as plain values that travel to a worker process.

Change here: what a reward function may see, and what counts as a failed score. No torch: workers start in 0.2 s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Attempt:
    """A response beside its question. Columns of the row are in `extra`; token_ids is int32 [T], response only."""

    prompt: str
    response: str
    answer: str
    source: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    token_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What scoring gave: finite `score`, `acc`, `pred`; or `failure`, why there is none (`nan`, `timeout`, …)."""

    score: float = 0.0
    acc: bool = False
    pred: str = ""
    failure: str | None = None


Judge = Callable[[Attempt], Any]
"""A reward function behind its adapter: returns a number, or a mapping with score and perhaps acc and pred."""


def judged(judge: Judge, attempt: Attempt) -> Outcome:
    """The outcome of one call. Never raises for what the function does: an exception is an outcome too."""
    try:
        return _as_outcome(judge(attempt))
    except _NotFiniteError as error:
        return Outcome(failure=str(error))
    except (Exception, SystemExit) as error:  # a reward that calls sys.exit() must not end the training run
        return Outcome(failure=f"exception: {type(error).__name__}: {error}")


def _as_outcome(result: Any) -> Outcome:
    """Without an acc of its own, a response is right when its score is positive."""
    fields = result if isinstance(result, Mapping) else {"score": result}
    if "score" not in fields:
        raise ValueError(f"the reward function gave a dict without 'score'; it has {', '.join(map(str, fields))}")
    score = _finite(fields["score"])
    acc = score if fields.get("acc") is None else _finite(fields["acc"])
    pred = fields.get("pred")
    return Outcome(score, acc > 0, "" if pred is None else str(pred))


class _NotFiniteError(Exception):
    """The message is `nan`, `inf` or `-inf`."""


def _finite(value: Any) -> float:
    """The number. Takes Python, numpy and 0-dimensional torch numbers."""
    if not isinstance(value, Real) and callable(getattr(value, "item", None)):
        value = value.item()
    if not isinstance(value, Real):
        raise TypeError(f"the reward function gave {value!r:.80} of type {type(value).__name__} instead of a number")
    number = float(value)
    if not math.isfinite(number):
        raise _NotFiniteError(number)
    return number
