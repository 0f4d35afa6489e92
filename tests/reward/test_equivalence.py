"""The grader math_verify: it compares text first, then values, in a process that is killed at its deadline."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from dapo_mcore.errors import RewardError
from dapo_mcore.reward.attempt import Attempt
from dapo_mcore.reward.explain import explain, explain_other
from dapo_mcore.reward.plugins import Rule, build_judge
from dapo_mcore.reward.pool import RewardPool

BY_VALUE = [  # response, truth, right
    ("**Answer: 18**", "18", True),
    ("Answer: \\(18\\)", "18", True),
    ("Answer: 18.0", "18", True),
    ("so \\boxed{\\frac12}", "0.5", True),
    ("first \\boxed{3}. That is wrong.\nSo \\boxed{\\sqrt{12}}, of 5 numbers", "2\\sqrt{3}", True),
    ("Answer: 19", "18", False),
    ("nothing", "18", False),
    ("Answer: 18", "", False),
    ("Answer: 18", "18" + "0" * 3000, False),
    ("Answer: 18" + " and so on" * 300, "18", False),  # before the window
    ("Answer: 3 = 12", "12", True),  # as the paper's rule has it
]


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    pytest.importorskip("math_verify", reason="needs math-verify: pip install 'dapo_mcore[math]'")
    workers = RewardPool(1, Rule("math_verify"), timeout_seconds=3.0)
    yield workers
    workers.close()


def test_answers_count_by_their_value(pool: RewardPool):
    outcomes = pool.score([Attempt("q", response, truth) for response, truth, _ in BY_VALUE])
    assert [(case[0][:40], outcome.acc) for case, outcome in zip(BY_VALUE, outcomes)] == [
        (response[:40], right) for response, _, right in BY_VALUE
    ]
    assert {outcome.score for outcome in outcomes} == {1.0, -1.0} and not any(o.failure for o in outcomes)
    assert [outcomes[n].pred for n in (2, 5, 6)] == ["18.0", "19", "[INVALID]"]


def test_a_computation_without_end_is_killed_at_the_deadline(pool: RewardPool):
    endless, fine = pool.score([Attempt("q", "Answer: $9^{9^{9^9}}$", "5"), Attempt("q", "Answer: 5", "5")])
    assert (endless.failure, fine.acc) == ("timeout", True)


def test_the_explanation_shows_both_graders():
    pytest.importorskip("math_verify", reason="needs math-verify: pip install 'dapo_mcore[math]'")
    attempt = Attempt("", "Answer: 18.0", "18")
    by_text, by_value = explain(attempt), explain(attempt, Rule("math_verify"))
    assert (by_text[-1], by_value[-1]) == ("  score       -1 (wrong)", "  score       +1 (right)")
    assert by_value[3] == "  prediction  '18.0' (compared by value)"
    assert explain_other(attempt, "math_dapo") == ["math_verify, for comparison", *by_value[1:]]
    assert explain_other(attempt, "math_verify") == ["math_dapo, for comparison", *by_text[1:]]
    assert explain_other(attempt, "some.module:function") == []


def test_without_the_package_it_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "dapo_mcore.reward.equivalence", raising=False)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(RewardError, match=r"needs the package math-verify .*pip install math-verify\[antlr4_13_2\]"):
        build_judge(Rule("math_verify", "verl"))
