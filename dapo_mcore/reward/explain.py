"""Why a response got its score, step by step, for people who wonder.

Change here: what `dapo-mcore reward-explain` tells. The verdict itself is the reward function's.
"""

from __future__ import annotations

import re

from dapo_mcore.errors import RewardError
from dapo_mcore.reward.attempt import Attempt, Outcome, judged
from dapo_mcore.reward.math_answer import _ANSWER_WINDOW, _BOX_WINDOW, ANSWER, last_boxed, normalize_answer
from dapo_mcore.reward.plugins import build_judge
from dapo_mcore.reward.pool import RewardPool

_DEADLINE_S = 30.0


_GRADERS = ("math_dapo", "math_verify")


def explain(
    attempt: Attempt, function: str = "math_dapo", adapter: str = "verl", strict_box: bool = False
) -> list[str]:
    """Return lines that say what was looked at, what matched, what was compared, and the score.

    Of a user's function only the outcome is known. Raise RewardError when it cannot be loaded.
    """
    outcome = _grade(attempt, function, adapter, strict_box)
    if function not in _GRADERS:
        lines = [f"function    {function}, called as {adapter}", f"prediction  {outcome.pred!r}"]
    else:
        shown = _explain_box if strict_box and function == "math_dapo" else _explain_answer
        lines = shown(attempt.response, attempt.answer)
    note = " (reward.on_failure decides what a run does with it)" if outcome.failure else ""
    return [*lines, f"score       {_verdict(outcome)}{note}"]


def explain_other(attempt: Attempt, function: str) -> list[str]:
    """Return a line with the verdict of the built-in grader that `function` is not; none for a user's function."""
    if function not in _GRADERS:
        return []
    (other,) = set(_GRADERS) - {function}
    try:
        outcome = _grade(attempt, other, adapter="verl", strict_box=False)
    except RewardError as error:
        return [f"{other:<11} {error}"]
    return [f"{other:<11} {_verdict(outcome)}, prediction {outcome.pred!r}"]


def _grade(attempt: Attempt, function: str, adapter: str, strict_box: bool) -> Outcome:
    """Return the outcome of a function as a run gets it: all but math_dapo have a process with a deadline."""
    if function == "math_dapo":
        return judged(build_judge(function, adapter, strict_box), attempt)
    pool = RewardPool(1, function, adapter, strict_box, timeout_seconds=_DEADLINE_S)
    try:
        (outcome,) = pool.score([attempt])
    finally:
        pool.close()
    return outcome


def _verdict(outcome: Outcome) -> str:
    if outcome.failure is not None:
        return f"none: {outcome.failure}"
    return f"{outcome.score:+g} ({'right' if outcome.acc else 'wrong'})"


def _explain_answer(response: str, ground_truth: str) -> list[str]:
    matches = list(ANSWER.finditer(response[-_ANSWER_WINDOW:]))
    lines = [_looked_at(response, _ANSWER_WINDOW)]
    if not matches:
        earlier = len(ANSWER.findall(response))
        hint = f"; {earlier} earlier, outside the window" if earlier else ""
        return [*lines, f"matched     no `Answer: …` in the window{hint}", f"truth       {ground_truth!r}"]
    found = matches[-1].group(1)
    return [
        *lines,
        f"matched     {_count(len(matches), '`Answer: …` line')}, the last is taken: {found!r}",
        f"prediction  {found!r} -> {normalize_answer(found)!r}",
        f"truth       {ground_truth!r} -> {normalize_answer(ground_truth)!r}",
    ]


def _explain_box(response: str, ground_truth: str) -> list[str]:
    window = response[-_BOX_WINDOW:]
    found, opened = last_boxed(window), len(re.findall(r"\\boxed\{", window))
    if found is None:
        matched = "a \\boxed{ that never closes" if opened else "no \\boxed{…} in the window"
    else:
        matched = f"{_count(opened, 'box')}, the last is taken: {found!r}"
    return [
        _looked_at(response, _BOX_WINDOW),
        f"matched     {matched}",
        f"prediction  {found!r} (compared literally)",
        f"truth       {ground_truth!r}",
    ]


def _looked_at(response: str, window: int) -> str:
    return f"looked at   the last {min(window, len(response))} of {len(response)} characters: {response[-window:]!r}"


def _count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("x") else "s")
    return f"{number} {noun if number == 1 else plural}"
