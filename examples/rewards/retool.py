"""ReTool's reward: the last \\boxed{} decides, and a wrong response loses less the more often it has called tools.

    reward: {function: "examples/rewards/retool.py:compute_score"}

Change here: the rule. `transcript` has the turns and the calls of a response, so a rule can also look at what a call gave.
"""

from __future__ import annotations

from typing import Any

from dapo_mcore.reward import math_answer

PER_TURN = 0.1
BEST_WRONG = -0.6


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any, transcript: dict[str, Any]
) -> dict[str, Any]:
    """Return +1 for a right response, else min(-0.6, -1 + 0.1 · turns that ended in a call): -1 without a call, -0.6 from four on.

    The same numbers as verl's recipe (verl-recipe 48ea0a7, retool/retool.py), whose num_turns is twice ours. slime counts calls
    in its place (-1.1 without a call, -0.6 at ten), miles half the calls. All four also pay for calls that fail.
    """
    verdict = math_answer.compute_score(solution_str, ground_truth, strict_box_verify=True)
    if verdict["acc"]:
        return verdict
    num_turns_with_calls = transcript["num_turns"] - 1
    return {**verdict, "score": min(BEST_WRONG, -1.0 + PER_TURN * num_turns_with_calls)}
