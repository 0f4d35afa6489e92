"""The example reward plug-ins, loaded by their paths: one against published answers of real models, one against verl's numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dapo_mcore.config.reward import RewardConfig
from dapo_mcore.reward.attempt import Attempt, Outcome, joined, judged
from dapo_mcore.reward.plugins import Rule, build_judge

EXAMPLES = Path(__file__).parents[2] / "examples"
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


@pytest.fixture(scope="module")
def judge():
    config = RewardConfig(function=f"{EXAMPLES / 'rewards' / 'gsm8k_a.py'}:compute_score")
    return build_judge(Rule.of(config))


@pytest.mark.parametrize(
    ("response", "truth", "outcome"),
    [
        ("16 - 7 = 9\nA: 18", "18", Outcome(1.0, True, "18")),
        ("A: 3\nA: $1,800", "1800", Outcome(1.0, True, "1800")),
        ("A: 1800", "1,800", Outcome(1.0, True, "1800")),
        ("A: 18.0", "18", Outcome(-1.0, False, "18.0")),
        ("18", "18", Outcome(-1.0, False, "[INVALID]")),
    ],
)
def test_the_rule(judge, response: str, truth: str, outcome: Outcome):
    assert judged(judge, Attempt("q", response, truth)) == outcome


def test_it_agrees_with_every_published_verdict(judge, real_data):
    """1,319 problems, four models: 5,276 answers with the verdicts of the GSM8K authors."""
    rows = [json.loads(line) for line in real_data("gsm8k/example_model_solutions.jsonl").open(encoding="utf-8")]
    found, published = [], []
    for row in rows:
        truth = row["ground_truth"].rpartition("A: ")[2]
        for model in MODELS:
            found.append(judged(judge, Attempt(row["question"], row[model]["solution"], truth)).acc)
            published.append(row[model]["is_correct"])
    assert len(found) == 5276
    assert 0 < sum(published) < 5276
    assert found == published


@pytest.mark.parametrize(
    ("num_calls", "wrong"),
    [
        (0, -1.0),
        (1, -0.9),
        (2, -0.8),
        (3, -0.7),
        (4, -0.6),
        (5, -0.6),
        (6, -0.6),
        (7, -0.6),
        (8, -0.6),
        (9, -0.6),
        (10, -0.6),
    ],
)
def test_retool_pays_for_calls_in_wrong_responses_only(num_calls: int, wrong: float):
    judge = build_judge(Rule(f"{EXAMPLES / 'rewards' / 'retool.py'}:compute_score", "verl"))
    calls = [{"name": "python", "arguments": "1", "kind": "error", "output": "\\boxed{7}", "seconds": 0.1}] * num_calls
    for text, score in (("so \\boxed{8}", wrong), ("so \\boxed{7}", 1.0), ("so 7", wrong)):
        turns = ["Let me see."] * num_calls + [text]
        attempt = Attempt("q", joined(turns), "7", transcript={"num_turns": len(turns), "turns": turns, "calls": calls})
        outcome = judged(judge, attempt)
        assert (outcome.score, outcome.acc) == (pytest.approx(score), score > 0), outcome
