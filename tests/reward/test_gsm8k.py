"""GSM8K's rule against verl's by hand, and on GSM8K's own solutions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dapo_mcore.reward.gsm8k import compute_score


@pytest.mark.parametrize(
    ("response", "truth", "pred", "right"),
    [
        ("so 9 * 2 = 18\n#### 18", "18", "18", True),
        ("#### 3\nno, wait\n#### 18", "18", "18", True),  # the last one counts
        ("#### 1,234", "1234", "1234", True),
        ("#### 1,234", "1,234", "1234", True),  # verl: wrong, as its data have no commas
        ("#### -3", "-3", "-3", True),
        ("#### 18.", "18", "18.", False),  # compared as text
        ("#### 18.0", "18", "18.0", False),
        ("#### $18", "18", "[INVALID]", False),
        ("####18", "18", "[INVALID]", False),  # the space is part of the mark
        ("The answer is 18", "18", "[INVALID]", False),
        ("#### 18" + "x" * 293, "18", "18", True),  # 300 characters
        ("#### 18" + "x" * 294, "18", "[INVALID]", False),
    ],
)
def test_the_number_after_the_last_mark_is_compared_as_text(response: str, truth: str, pred: str, right: bool):
    assert compute_score(response, truth) == {"score": float(right), "acc": right, "pred": pred}


def test_all_of_gsm8ks_own_solutions_are_right(real_data: Callable[[str], Path]):
    rows = [json.loads(line) for line in real_data("gsm8k/test.jsonl").read_text().splitlines()]
    truths = [row["answer"].rpartition("#### ")[2] for row in rows]
    assert len(rows) == 1319
    assert all(compute_score(row["answer"], truth)["acc"] for row, truth in zip(rows, truths, strict=True))
    assert not any(compute_score(row["answer"], f"{truth}1")["acc"] for row, truth in zip(rows, truths, strict=True))


def test_the_verdict_on_models_solutions_is_theirs(real_data: Callable[[str], Path]):
    """GSM8K's authors graded four models' solutions, which end in `A: 18`. Rewritten to end in `#### 18`, the rule agrees with
    their verdict wherever both name a whole number."""
    rows = [json.loads(line) for line in real_data("gsm8k/example_model_solutions.jsonl").read_text().splitlines()]
    asked = agreed = 0
    for row in rows:
        truth = row["ground_truth"].rpartition("A: ")[2].replace(",", "")
        for model in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
            _, mark, answer = row[model]["solution"].rpartition("A: ")
            if mark and answer.replace(",", "").lstrip("-").isdecimal():
                asked += 1
                agreed += compute_score(f"#### {answer}", truth)["acc"] == row[model]["is_correct"]
    assert asked > 5000 and agreed == asked
