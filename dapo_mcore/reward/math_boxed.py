"""The grader `math_boxed`: the last box of a response against the ground truth, in the normal form of the MATH data set.

Change here: how the box is found, and what counts as equal. The rule is that of verl's utils/reward_score/math_reward.py (b178a3c),
which goes back to the MATH data set (arXiv 2103.03874). It compares text: `0.5` is `\\frac{1}{2}`, but `0.25` is not `\\frac{1}{4}`.
"""

from __future__ import annotations

import re
from functools import lru_cache

from dapo_mcore.reward.math_answer import INVALID, MathScore, last_boxed

_BOX = "\\boxed"
_REMOVED_FIRST = ("\n", "\\!")
_RENAMED = (("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"))
_REMOVED = ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$")
_UNIT = "\\text{ "


def compute_score(solution_str: str, ground_truth: str) -> MathScore:
    """Return score 1 if the last box holds the ground truth, else 0."""
    found = _answer(solution_str)
    acc = found is not None and _is_equal(found, ground_truth)
    return {"score": float(acc), "acc": acc, "pred": INVALID if found is None else found}


def _answer(text: str) -> str | None:
    """Return what the last `\\boxed{…}` holds, with balanced braces; None if it is not closed, or is no box.

    A `\\boxed 7$` anywhere comes first: its answer ends with the line's formula.
    """
    _, spaced, after = text.rpartition(f"{_BOX} ")
    if spaced:
        return after.split("$", 1)[0]
    start = text.rfind(_BOX)
    return last_boxed(text[start:]) if start >= 0 and text.startswith(f"{_BOX}{{", start) else None


def _is_equal(answer: str, ground_truth: str) -> bool:
    """Return True if the normal forms are equal or, if one of them has none, the texts."""
    try:
        return normal_form(answer) == _truth_form(ground_truth)
    except ValueError:
        return answer == ground_truth


@lru_cache(maxsize=1024)
def _truth_form(ground_truth: str) -> str:
    """Return the normal form, cached because the samples of a group share one ground truth."""
    return normal_form(ground_truth)


def normal_form(text: str) -> str:
    """Return the answer without units, spaces and LaTeX that changes nothing. Raise ValueError for LaTeX that breaks off.

    Examples: `x = \\dfrac12` -> `\\frac{1}{2}`; `10\\text{ cm}` -> `10`; `.5` -> `0.5` -> `\\frac{1}{2}`; `3/4` -> `\\frac{3}{4}`.
    """
    for part in _REMOVED_FIRST:
        text = text.replace(part, "")
    for before, after in _RENAMED:
        text = text.replace(before, after)
    for part in _REMOVED:
        text = text.replace(part, "")
    text = _without_unit(text).replace("\\\\%", "").replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    text = f"0{text}" if text.startswith(".") else text
    name, equals, value = text.partition("=")
    if equals and "=" not in value and len(name) <= 2:
        text = value
    text = _with_braced_fractions(_with_braced_roots(text).replace(" ", ""))
    return "\\frac{1}{2}" if text == "0.5" else _as_fraction(text)


def _without_unit(text: str) -> str:
    """Remove a unit such as `\\text{ cm}` and all after it. Raise ValueError if there are several."""
    if text.count(_UNIT) > 1:
        raise ValueError(text)
    return text.partition(_UNIT)[0]


def _with_braced_roots(text: str) -> str:
    """Write `\\sqrt3` as `\\sqrt{3}`. Raise ValueError for a root of nothing."""
    if re.search(r"\\sqrt(\Z|\\sqrt)", text):
        raise ValueError(text)
    return re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text)


def _with_braced_fractions(text: str) -> str:
    """Write `\\frac12` as `\\frac{1}{2}`, and `\\frac1{72}` as `\\frac{1}{72}`. `\\frac1` alone leaves the whole text as it is.

    Raise ValueError for a fraction of nothing.
    """
    written, *parts = text.split("\\frac")
    for part in parts:
        if not part:
            raise ValueError(text)
        if not part.startswith("{"):
            if len(part) < 2:
                return text
            below = part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}"
            part = f"{{{part[0]}}}{below}"
        written += f"\\frac{part}"
    return written


def _as_fraction(text: str) -> str:
    """Write `3/4`, whole numbers without leading zeros, as a fraction of LaTeX. Other text stays."""
    above, slash, below = text.partition("/")
    try:
        if slash and f"{int(above)}/{int(below)}" == text:
            return f"\\frac{{{above}}}{{{below}}}"
    except ValueError:
        pass
    return text
