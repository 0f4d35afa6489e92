"""The grader `gsm8k`: the number after the last `####`, as GSM8K's own solutions end.

Change here: how that number is found. The rule is verl's utils/reward_score/gsm8k.py (b178a3c), form strict. Different from verl:
commas are removed from the ground truth, too, where verl can never find `1,000` right.
"""

from __future__ import annotations

import re

from dapo_mcore.reward.math_answer import INVALID, MathScore

_ANSWER = re.compile(r"#### (-?[0-9.,]+)")
_WINDOW = 300  # characters


def compute_score(solution_str: str, ground_truth: str) -> MathScore:
    """Return score 1 if the number after the last `#### ` of the last 300 characters is the ground truth as text, else 0.

    Commas do not count: `#### 1,234` is `1234`. `#### 18.` and `#### 18.0` are not `18`, and `#### $18` is no answer.
    """
    found = _ANSWER.findall(solution_str[-_WINDOW:])
    pred = found[-1].replace(",", "") if found else None
    acc = pred == ground_truth.replace(",", "")
    return {"score": float(acc), "acc": acc, "pred": INVALID if pred is None else pred}
