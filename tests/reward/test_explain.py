"""The explanation names the window, the match, both normal forms and the verdict, and never contradicts the score."""

from __future__ import annotations

from pathlib import Path

import pytest

from dapo_mcore.errors import DataError, RewardError
from dapo_mcore.reward.attempt import Attempt, Outcome, joined
from dapo_mcore.reward.explain import explain, explain_other, read_transcript
from dapo_mcore.reward.math_answer import INVALID, compute_score
from dapo_mcore.reward.plugins import Rule


class FakePool:
    """A pool whose grader always gives `outcome`."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def score(self, attempts: list[Attempt]) -> list[Outcome]:
        return [self.outcome for _ in attempts]

    def close(self) -> None: ...


def attempt(response: str, answer: str) -> Attempt:
    return Attempt(prompt="", response=response, answer=answer)


def test_the_last_answer_is_named_with_both_normal_forms() -> None:
    lines = explain(attempt("Answer: 3\nwait. Answer: $x = \\frac12$", "\\frac{1}{2}"))
    assert lines == [
        "math_dapo",
        "  looked at   all 37 characters: 'Answer: 3\\nwait. Answer: $x = \\\\frac12$'",
        "  matched     2 `Answer: …` lines, the last is taken: '$x = \\\\frac12$'",
        "  prediction  '$x = \\\\frac12$' -> '\\\\frac{1}{2}'",
        "  truth       '\\\\frac{1}{2}' -> '\\\\frac{1}{2}'",
        "  score       +1 (right)",
    ]


def test_an_answer_before_the_window_is_pointed_out() -> None:
    lines = explain(attempt("Answer: 3\n" + "x" * 300, "3"))
    assert "the last 300 of 310 characters" in lines[1]
    assert lines[2] == "  matched     no `Answer: …` in the window; 1 earlier, outside the window"
    assert lines[-1] == "  score       -1 (wrong)"


@pytest.mark.parametrize(
    ("response", "matched"),
    [
        ("so \\boxed{4} and \\boxed{3}", "2 boxes, the last is taken: '3'"),
        ("so 3", "no \\boxed{…} in the window"),
        ("so \\boxed{3", "a \\boxed{ that never closes"),
    ],
)
def test_the_strict_box_says_which_box_counts(response: str, matched: str) -> None:
    lines = explain(attempt(response, "3"), Rule(strict_box=True))
    assert lines[0] == "math_dapo with strict_box" and f"  matched     {matched}" in lines


@pytest.mark.parametrize("response", ["Answer: 3", "Answer: 4", "3", "\\boxed{3}", "", "Answer: 3\n" + "y" * 400])
@pytest.mark.parametrize("strict_box", [False, True])
def test_the_verdict_is_the_reward_functions(response: str, strict_box: bool) -> None:
    expected = compute_score(response, "3", strict_box)
    assert explain(attempt(response, "3"), Rule(strict_box=strict_box))[-1].startswith(
        f"  score       {expected['score']:+g} ("
    )


def test_a_users_function_shows_its_outcome_or_its_failure(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def length(data_source, solution_str, ground_truth, extra_info):\n    return 10 / len(solution_str)\n"
    )
    spec = f"{tmp_path / 'mine.py'}:length"
    assert explain(attempt("12345", "3"), Rule(spec))[-1] == "  score       +2 (right)"
    assert "none: exception: ZeroDivisionError" in explain(attempt("", "3"), Rule(spec))[-1]


def test_a_grader_that_is_not_installed_gives_one_line_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RewardError("reward.function math_verify needs the package math-verify")

    monkeypatch.setattr("dapo_mcore.reward.explain.RewardPool", refuse)
    (line,) = explain_other(attempt("Answer: 18.0", "18"), "math_dapo")
    assert line == "math_verify, for comparison: not installed here; pip install 'math-verify[antlr4_13_2]' adds it"


@pytest.mark.parametrize("response", ["Answer: 3", "3", "", "\\boxed{3}"])
def test_every_block_has_the_same_layout(response: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = attempt(response, "3")
    blocks = [explain(asked), explain(asked, Rule(strict_box=True))]
    for outcome in (Outcome(1.0, True, "3"), Outcome(-1.0, False, INVALID), Outcome(failure="timeout")):
        monkeypatch.setattr("dapo_mcore.reward.explain.RewardPool", lambda *_, result=outcome, **__: FakePool(result))
        blocks.append(explain_other(asked, "math_dapo"))
    assert [block[0] for block in blocks[1:]] == ["math_dapo with strict_box", *["math_verify, for comparison"] * 3]
    labels = ["  looked at   ", "  matched     ", "  prediction  ", "  truth       ", "  score       "]
    assert [[line[:14] for line in block[1:]] for block in blocks] == [labels] * 5


def test_calls_are_listed_and_their_output_is_not_searched() -> None:
    found = read_transcript('{"turns": ["Answer: 3", "x"], "calls": [{"name": "python", "output": "Answer: 7"}]}')
    one = Attempt(prompt="", response=joined(found["turns"]), answer="7", transcript=found)
    lines = explain(one)
    assert lines[:4] == [
        "math_dapo",
        "  turns       2; what tools gave is not scored",
        "  call 1      python: ok: 'Answer: 7'",
        "  looked at   all 11 characters: 'Answer: 3\\nx'",
    ]
    assert lines[-1] == "  score       -1 (wrong)"
    assert not any("call 1" in line for line in explain_other(one, "math_dapo"))


@pytest.mark.parametrize(
    "text", ["", "[3]", '{"turns": "Answer: 7"}', '{"turns": [7]}', '{"turns": ["x"], "calls": [7]}', "{"]
)
def test_something_else_than_a_transcript_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"--transcript (must be a JSON object such as|is not valid JSON)"):
        read_transcript(text)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (
            '"calls": [{"foo": 1}]',
            "call 1 has the unknown key 'foo'; the keys are name, arguments, kind, output, seconds$",
        ),
        ('"cals": []', "--transcript has the unknown key 'cals'; the keys are num_turns, turns, calls$"),
        (
            '"calls": [{}, {"kind": "okay"}]',
            "call 2 has kind 'okay'; the kinds are ok, error, timeout, infrastructure$",
        ),
        ('"calls": [{"output": 7}]', "call 1 has output 7; it must be text$"),
        ('"calls": [{"seconds": "1"}]', "call 1 has seconds '1'; it must be a number$"),
        ('"num_turns": 2', "has num_turns 2, but 1 turns; leave num_turns out$"),
    ],
)
def test_a_transcript_that_no_run_gives_is_refused(more: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read_transcript(f'{{"turns": ["x"], {more}}}')


def test_a_source_leads_to_its_rule() -> None:
    lines = explain(Attempt("q", "so it is\n#### 7", "7", "openai/gsm8k"), Rule("by_source"))
    assert lines == [
        "by_source takes for 'openai/gsm8k' gsm8k",
        "  looked at   the number after the last `#### ` of the last 300 characters",
        "  prediction  '7'",
        "  truth       '7'",
        "  score       +1 (right)",
    ]
    lines = explain(Attempt("q", "7", "7", "lighteval/MATH"), Rule("by_source"))
    assert lines[2:] == ["  prediction  none", "  truth       '7'", "  score       +0 (wrong)"]
    with pytest.raises(RewardError, match="no rule for the data source 'mine'; name one with --source"):
        explain(Attempt("q", "7", "7", "mine"), Rule("by_source"))
