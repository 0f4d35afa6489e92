"""The grader `math_dapo`: the rule of the DAPO paper for mathematics with one final answer.

Change here: how an answer is found in a response and normalised.
The rule and its constants are those of verl's utils/reward_score/math_dapo.py, whose normalisation comes from Minerva
(arXiv 2206.14858, appendix D.1). Different from verl: a response without an answer is always wrong.

The rule compares text, so it errs both ways. It wrongly accepts `Answer: 1, 2` and `Answer: a 12` for `12` (it removes
spaces, commas and the letter a before a space), and `Answer: 3 = 12` (it takes what follows the last `=`). It wrongly
rejects what chat models like to write: `**Answer: 12**`, `Answer: \\(12\\)` and `Answer: 12.0`. The grader
math_verify (equivalence.py) accepts these by their value.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TypedDict

ANSWER = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")
INVALID = "[INVALID]"
_ANSWER_WINDOW = 300  # characters; the longest answer of MATH-500 has 159
_BOX_WINDOW = 100
VALUE_WINDOW = 2000
"""Characters at the end of a response that math_verify searches. It compares a longer ground truth only as text."""

# Applied in this order: the articles need the spaces, which a later entry removes.
_REPLACED = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    ("\\$", ""),
    ("\\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (",\\text{and}", ","),
    ("\\text{and}", ","),
    ("\\text{m}", "\\text{}"),
)

_REMOVED = (
    *("square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", "\\ldots", "sue", "points"),
    *("feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students"),
    *("childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3"),
    *("\\text{\n}", "\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots"),
)

_WRAPPERS = tuple(re.compile(rf"\\{name}{{(.*?)}}") for name in ("text", "textbf", "overline"))
_FRACTION = re.compile(r"(frac)([^{])(.)")  # \frac12 -> \frac{1}{2}
_ROOT = re.compile(r"(sqrt)([^{])")  # \sqrt2 -> \sqrt{2}


class MathScore(TypedDict):
    """score: +1.0 or -1.0. acc: right or wrong. pred: the answer that was found, as it was compared."""

    score: float
    acc: bool
    pred: str


def compute_score(solution_str: str, ground_truth: str, strict_box_verify: bool = False) -> MathScore:
    """Return score +1 if the response's answer equals the ground truth, else -1.

    Take the last `Answer: …` of the last 300 characters and compare normal forms. With `strict_box_verify`, take the
    last `\\boxed{…}` of the last 100 characters and compare literally.
    """
    if strict_box_verify:
        found = last_boxed(solution_str[-_BOX_WINDOW:])
        pred, truth = found, ground_truth
    else:
        answers = ANSWER.findall(solution_str[-_ANSWER_WINDOW:])
        found = answers[-1] if answers else None
        pred, truth = normalize_answer(found or ""), _normalized_truth(ground_truth)
    acc = found is not None and pred == truth
    return {"score": 1.0 if acc else -1.0, "acc": acc, "pred": INVALID if found is None else str(pred)}


def normalize_answer(answer: str) -> str:
    """Return the normal form of an answer, in time proportional to its length.

    Examples: `x = 1,234 dollars` -> `1234`; `$\\frac12$` -> `\\frac{1}{2}`.
    """
    answer = answer.split("=")[-1]
    for before, after in _REPLACED:
        answer = answer.replace(before, after)
    for expression in _REMOVED:
        answer = answer.replace(expression, "")
    answer = "\n".join(map(_unwrapped, answer.split("\n")))
    answer = _ROOT.sub(r"sqrt{\2}", _FRACTION.sub(r"frac{\2}{\3}", answer))
    answer = answer.replace("$", "")
    without_commas = answer.replace(",", "")
    return (without_commas if without_commas.isdigit() else answer).strip()


@lru_cache(maxsize=1024)
def _normalized_truth(ground_truth: str) -> str:
    """Return the normal form, cached because the samples of a group share one ground truth, which may be long."""
    return normalize_answer(ground_truth)


def _unwrapped(line: str) -> str:
    """Return what stands between the first two dollar signs, without the wrappers of LaTeX text and boxes.

    verl does this by regular expressions with several `.*`, which take quadratic time on a line without a match.
    """
    parts = line.split("$", 2)
    if len(parts) == 3:
        line = f"${parts[1]}$"
    for wrapper in _WRAPPERS:
        inside, brace, after = line.rpartition(
            "}"
        )  # up to here every opening brace has its match, so none is tried in vain
        line = wrapper.sub(r"\1", inside + brace) + after
    return _without_box(line)


def _without_box(line: str) -> str:
    """Remove the first `\\boxed{` and the last closing brace after it."""
    before, _, after = line.partition("\\boxed{")
    inside, brace, rest = after.rpartition("}")
    return before + inside + rest if brace else line


def last_boxed(text: str) -> str | None:
    """Return the content of the last `\\boxed{…}`, with balanced braces; None if there is none or it never closes."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return None
