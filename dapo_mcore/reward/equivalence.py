"""Right or wrong by value: `math_verify`, Hugging Face's grader behind the rule of the paper.

Change here: what math-verify is given. It parses LaTeX and computes with SymPy, which may take for ever, so it only runs
in reward processes, whose deadline is reward.timeout_seconds: a grade out of time is a failure, not a wrong answer.
Importing this module needs the package: pip install math-verify[antlr4_13_2].
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from dapo_mcore.reward import math_answer
from dapo_mcore.reward.math_answer import INVALID, VALUE_WINDOW, MathScore

# They would warn at every call that their alarm, which needs the main thread and a loop in Python, is off.
for _name in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def compute_score(solution_str: str, ground_truth: str) -> MathScore:
    """Return +1 when the response's answer equals the ground truth by the paper's rule or, failing that, by value; else -1.

    By value, under math-verify's own rules, the last `\\boxed{…}` counts (boxes close to each other make one set), else the
    last formula or number: `**Answer: 18**`, `\\(18\\)` and `18.0` are 18, and `0.5` is `\\frac{1}{2}`. What the paper's
    rule wrongly takes for right (see math_answer.py) stays right.
    """
    exact = math_answer.compute_score(solution_str, ground_truth)
    if exact["acc"]:
        return exact
    answer = _parsed(
        solution_str[-VALUE_WINDOW:], (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    )
    acc = bool(answer) and verify(_parsed_truth(ground_truth), answer, timeout_seconds=None)
    return {"score": 1.0 if acc else -1.0, "acc": acc, "pred": str(answer[-1]) if answer else INVALID}


@lru_cache(maxsize=1024)
def _parsed_truth(ground_truth: str) -> list[Any]:
    """A group's samples share one truth."""
    if len(ground_truth) > VALUE_WINDOW:
        return []
    return _parsed(f"\\boxed{{{ground_truth}}}", (LatexExtractionConfig(),))


def _parsed(text: str, kinds: tuple[Any, ...]) -> list[Any]:
    """Return the answer in `text` as math-verify's list of a SymPy value and the text; [] where it finds none."""
    return parse(text, extraction_config=kinds, parsing_timeout=None)
