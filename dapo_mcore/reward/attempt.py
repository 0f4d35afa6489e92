"""One response to score and the outcome, as plain values that are sent to and from a worker process.

Change here: what a reward function may see, and what counts as a failed score. No torch, so workers start in 0.2 s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, TypedDict

import numpy as np

from dapo_mcore.errors import describe_error
from dapo_mcore.process.signals import Interrupted

LARGEST_SCORE = 1e30
"""Squares of a group's rewards stay finite in float64, and their advantages in float32."""
_LONGEST_TEXT = 1000


class Transcript(TypedDict):
    """How a response came about. Without tools it is one turn, without calls.

    num_turns  turns that the policy wrote.
    turns      their texts; one without any token has none.
    calls      of tools, in order: {name, arguments, kind, output, seconds} each, as in types.ToolCall.
    """

    num_turns: int
    turns: list[str]
    calls: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Attempt:
    """A response and its prompt.

    response    what the policy wrote, and nothing that a tool gave; with tools, its turns with a line break between them.
    messages    the prompt as the row has it if it is a chat, else None.
    extra       the row's columns, without the prompt.
    token_ids   int32 [T], what the policy wrote.
    transcript  None stands for a single turn, the response.
    """

    prompt: str
    response: str
    answer: str
    source: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    token_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    messages: Sequence[Mapping[str, Any]] | None = None
    transcript: Transcript | None = None

    def full_transcript(self) -> Transcript:
        """Return the transcript, also of a single turn."""
        return self.transcript or {"num_turns": 1, "turns": [self.response], "calls": []}


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of scoring: a finite `score`, `acc` in [0, 1], `pred`; or `failure`, the reason why there is no score."""

    score: float = 0.0
    acc: float = 0.0
    pred: str = ""
    failure: str | None = None


def joined(turns: Sequence[str]) -> str:
    """Return the response that is scored. The line breaks keep one turn's last line apart from the next one's first."""
    return "\n".join(turns)


Judge = Callable[[Attempt], Any]
"""A reward function with one calling convention. It returns a number, or a mapping with score and perhaps acc and pred."""


def judged(judge: Judge, attempt: Attempt) -> Outcome:
    """Call the function once and return the outcome. Exceptions become outcomes.

    Raise only Interrupted: a signal ends the run. Other BaseExceptions, such as asyncio's CancelledError, SystemExit or
    the timeouts of some packages, must not end it.
    """
    try:
        return _as_outcome(judge(attempt))
    except _NoNumberError as error:
        return Outcome(failure=str(error))
    except Interrupted:
        raise
    except BaseException as error:
        return Outcome(failure=f"exception: {describe_error(error)}")


def _as_outcome(result: Any) -> Outcome:
    """Return the outcome of what the function returned. Without `acc`, the score stands for it, as in verl; both are held
    between 0 and 1, so that a score of -1 is no less right than one of 0."""
    fields = result if isinstance(result, Mapping) else {"score": result}
    if "score" not in fields:
        raise ValueError(f"the reward function gave a dict without 'score'; it has {', '.join(map(str, fields))}")
    score = _finite(fields["score"])
    acc = score if fields.get("acc") is None else _finite(fields["acc"])
    pred = fields.get("pred")
    return Outcome(score, min(max(acc, 0.0), 1.0), "" if pred is None else str(pred)[:_LONGEST_TEXT])


class _NoNumberError(Exception):
    """The message is `none`, `nan`, `inf`, `-inf` or `too large`."""


def _finite(value: Any) -> float:
    """Return the number. Accept Python, numpy and torch numbers; of arrays only those with one element."""
    if not isinstance(value, Real) and callable(getattr(value, "item", None)):
        value = value.item()
    if value is None:
        raise _NoNumberError("none: the reward function gave no score for this sample")
    if not isinstance(value, Real):
        raise TypeError(f"the reward function gave {value!r:.80} of type {type(value).__name__} instead of a number")
    number = float(value)
    if not math.isfinite(number):
        raise _NoNumberError(number)
    if abs(number) > LARGEST_SCORE:
        raise _NoNumberError(f"too large: {number:g} is beyond ±{LARGEST_SCORE:g}")
    return number
