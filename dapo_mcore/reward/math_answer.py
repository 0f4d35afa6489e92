"""Right or wrong for mathematics with one final answer: `math_dapo`, the rule of the DAPO paper.

Change here: how an answer is found in a response and brought to normal form.
Meaning and constants follow verl's utils/reward_score/math_dapo.py, which took its normal form from Minerva
(arXiv 2206.14858, appendix D.1). Different from verl: a response without an answer is wrong whatever the truth is.

The rule compares text, so it errs both ways. Right, though it should not be: `Answer: 1, 2` and `Answer: a12` for `12`
(spaces, commas and the letter a with a space go), and `Answer: 3 = 12` (only what follows the last `=` counts). Wrong,
though it should not be: what chat models like to write, `**Answer: 12**`, `Answer: \\(12\\)` and `Answer: 12.0`.
The grader math_verify (equivalence.py) takes these by their value.
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
"""Characters of a response, from its end, that math_verify searches for an answer; a longer truth it compares as text only."""

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
    """score +1.0 or -1.0; acc, right or wrong; pred, the answer that was found, in the form it was compared in."""

    score: float
    acc: bool
    pred: str


def compute_score(solution_str: str, ground_truth: str, strict_box_verify: bool = False) -> MathScore:
    """Score of a response: +1 when its answer equals the ground truth, else -1.

    Looks at the last 300 characters for the last `Answer: …` and compares normal forms. With `strict_box_verify`, looks
    at the last 100 characters for the last `\\boxed{…}` and compares literally.
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
    """A group's samples share one truth, which may be a page of worked solution."""
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
    """What the last `\\boxed{…}` holds, braces inside it balanced; None when there is none or it never closes."""
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
