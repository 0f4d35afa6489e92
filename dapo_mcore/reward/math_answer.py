"""Right or wrong for mathematics with one final answer: `math_dapo`, the rule of the DAPO paper.

Change here: how an answer is found in a response and brought to normal form.
Meaning and constants follow verl's utils/reward_score/math_dapo.py, which took its normal form from Minerva
(arXiv 2206.14858, appendix D.1). Different from verl: a response without an answer is wrong whatever the truth is.
"""

from __future__ import annotations

import re
from typing import TypedDict

ANSWER = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")
INVALID = "[INVALID]"
_ANSWER_WINDOW = 300  # characters; the longest answer of MATH-500 has 159
_BOX_WINDOW = 100

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

_REWRITTEN = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(.*?)(\$)(.*?)(\$)(.*)", r"$\3$"),  # only what stands between dollar signs
        (r"(\\text\{)(.*?)(\})", r"\2"),
        (r"(\\textbf\{)(.*?)(\})", r"\2"),
        (r"(\\overline\{)(.*?)(\})", r"\2"),
        (r"(\\boxed\{)(.*)(\})", r"\2"),
        (r"(frac)([^{])(.)", r"frac{\2}{\3}"),  # \frac12 -> \frac{1}{2}
        (r"(sqrt)([^{])", r"sqrt{\2}"),  # \sqrt2 -> \sqrt{2}
    )
)


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
        pred, truth = normalize_answer(found or ""), normalize_answer(ground_truth)
    acc = found is not None and pred == truth
    return {"score": 1.0 if acc else -1.0, "acc": acc, "pred": INVALID if found is None else str(pred)}


def normalize_answer(answer: str) -> str:
    """The normal form of an answer. Examples: `x = 1,234 dollars` -> `1234`; `$\\frac12$` -> `\\frac{1}{2}`."""
    answer = answer.split("=")[-1]
    for before, after in _REPLACED:
        answer = answer.replace(before, after)
    for expression in _REMOVED:
        answer = answer.replace(expression, "")
    for pattern, replacement in _REWRITTEN:
        answer = pattern.sub(replacement, answer)
    answer = answer.replace("$", "")
    without_commas = answer.replace(",", "")
    return (without_commas if without_commas.isdigit() else answer).strip()


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
