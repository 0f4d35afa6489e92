"""The explanation names the window, the match, both normal forms and the verdict, and never contradicts the score."""

from __future__ import annotations

from pathlib import Path

import pytest

from dapo_mcore.reward.attempt import Attempt
from dapo_mcore.reward.explain import explain
from dapo_mcore.reward.math_answer import compute_score


def attempt(response: str, answer: str) -> Attempt:
    return Attempt(prompt="", response=response, answer=answer)


def test_the_last_answer_is_named_with_both_normal_forms() -> None:
    lines = explain(attempt("Answer: 3\nwait. Answer: $x = \\frac12$", "\\frac{1}{2}"))
    assert lines == [
        "looked at   the last 37 of 37 characters: 'Answer: 3\\nwait. Answer: $x = \\\\frac12$'",
        "matched     2 `Answer: …` lines, the last is taken: '$x = \\\\frac12$'",
        "prediction  '$x = \\\\frac12$' -> '\\\\frac{1}{2}'",
        "truth       '\\\\frac{1}{2}' -> '\\\\frac{1}{2}'",
        "score       +1 (right)",
    ]


def test_an_answer_before_the_window_is_pointed_out() -> None:
    lines = explain(attempt("Answer: 3\n" + "x" * 300, "3"))
    assert "the last 300 of 310 characters" in lines[0]
    assert lines[1] == "matched     no `Answer: …` in the window; 1 earlier, outside the window"
    assert lines[-1] == "score       -1 (wrong)"


@pytest.mark.parametrize(
    ("response", "matched"),
    [
        ("so \\boxed{4} and \\boxed{3}", "2 boxes, the last is taken: '3'"),
        ("so 3", "no \\boxed{…} in the window"),
        ("so \\boxed{3", "a \\boxed{ that never closes"),
    ],
)
def test_the_strict_box_says_which_box_counts(response: str, matched: str) -> None:
    lines = explain(attempt(response, "3"), strict_box=True)
    assert f"matched     {matched}" in lines


@pytest.mark.parametrize("response", ["Answer: 3", "Answer: 4", "3", "\\boxed{3}", "", "Answer: 3\n" + "y" * 400])
@pytest.mark.parametrize("strict_box", [False, True])
def test_the_verdict_is_the_reward_functions(response: str, strict_box: bool) -> None:
    expected = compute_score(response, "3", strict_box)
    assert explain(attempt(response, "3"), strict_box=strict_box)[-1].startswith(
        f"score       {expected['score']:+g} ("
    )


def test_a_users_function_shows_its_outcome_or_its_failure(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def length(data_source, solution_str, ground_truth, extra_info):\n    return 10 / len(solution_str)\n"
    )
    spec = f"{tmp_path / 'mine.py'}:length"
    assert explain(attempt("12345", "3"), spec)[-1] == "score       +2 (right)"
    assert "none: exception: ZeroDivisionError" in explain(attempt("", "3"), spec)[-1]
