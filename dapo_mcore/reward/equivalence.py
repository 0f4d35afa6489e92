"""The grader `math_verify`: the rule of the paper and, failing that, Hugging Face's comparison by value.

Change here: what math-verify gets. It parses LaTeX and computes with SymPy, which may never end, so it runs only in
reward processes, with the deadline reward.timeout_seconds. A timeout is a failure, not a wrong answer.
Importing this module needs the package: pip install math-verify[antlr4_13_2].
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from dapo_mcore.reward import math_answer
from dapo_mcore.reward.math_answer import INVALID, VALUE_WINDOW, MathScore

# They would warn at every call that their own timeout is off, which works only in a main thread and in Python code.
for _name in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def compute_score(solution_str: str, ground_truth: str) -> MathScore:
    """Return score +1 if the response's answer equals the ground truth by the paper's rule or by value, else -1.

    By value, math-verify takes the last `\\boxed{…}` (boxes close to each other are one set), else the last formula or
    number: `**Answer: 18**`, `\\(18\\)` and `18.0` are 18, and `0.5` is `\\frac{1}{2}`. Answers that the paper's rule
    wrongly accepts (see math_answer.py) stay right.
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
    """Return the parsed ground truth, cached because the samples of a group share it."""
    if len(ground_truth) > VALUE_WINDOW:
        return []
    return _parsed(f"\\boxed{{{ground_truth}}}", (LatexExtractionConfig(),))


def _parsed(text: str, kinds: tuple[Any, ...]) -> list[Any]:
    """Return the answer in `text` as math-verify's list of a SymPy value and the text; [] if it finds none."""
    return parse(text, extraction_config=kinds, parsing_timeout=None)
