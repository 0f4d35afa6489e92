"""A reward plug-in for responses that end in `A: 18`, as the published GSM8K solutions do.

    reward: {function: "examples/rewards/gsm8k_a.py:compute_score"}

Change here: the rule. Any function with verl's signature can take its place; return a number, or a dict as below.
"""

from __future__ import annotations

import re
from typing import Any

ANSWER = re.compile(r"A: *(.*)")


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> dict[str, Any]:
    """+1 when the last `A:` line holds the ground truth, commas and dollar signs aside; else -1."""
    answers = ANSWER.findall(solution_str)
    pred = plain_number(answers[-1]) if answers else None
    acc = pred is not None and pred == plain_number(ground_truth)
    return {"score": 1.0 if acc else -1.0, "acc": acc, "pred": pred or "[INVALID]"}


def plain_number(text: str) -> str:
    """`$1,234 ` -> `1234`."""
    return text.replace(",", "").replace("$", "").strip()
