"""One call of a reward function: what counts as a score, and what counts as a failure."""

from __future__ import annotations

import signal

import numpy as np
import pytest
import torch

from dapo_mcore.process.signals import ControllerShutdown, Interrupted
from dapo_mcore.reward.attempt import Attempt, Outcome, judged


def test_a_signal_that_ends_the_run_is_no_failure_of_a_sample():
    def judge(attempt: Attempt) -> float:
        signal.raise_signal(signal.SIGINT)
        return 1.0

    with pytest.raises(Interrupted), ControllerShutdown(lambda: "bye"):
        judged(judge, Attempt("q", "7", "7"))


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (True, Outcome(1.0, True)),
        (np.float32(0.25), Outcome(0.25, 0.25)),
        (np.bool_(False), Outcome(0.0, False)),
        (torch.tensor(-1.0), Outcome(-1.0, False)),
        ({"score": -1.0, "acc": True, "pred": None}, Outcome(-1.0, True)),
        ({"score": 1.0, "acc": np.float64(0.0), "pred": 5}, Outcome(1.0, False, "5")),
        ({"score": 0.3, "acc": 0.75}, Outcome(0.3, 0.75)),
        ({"score": 0.0, "acc": -2}, Outcome(0.0, 0.0)),
        ({"score": 1.0, "acc": float("nan")}, Outcome(failure="nan")),
        ({"score": 1.0, "acc": None}, Outcome(1.0, True)),
        ({"score": None}, Outcome(failure="none: the reward function gave no score for this sample")),
        ({"score": 10**400}, Outcome(failure="exception: OverflowError: int too large to convert to float")),
        ({"score": 1.0, "pred": "x" * 10**6}, Outcome(1.0, True, "x" * 1000)),
        (np.array([2.0]), Outcome(2.0, True)),
    ],
)
def test_what_counts_as_a_number(result, expected: Outcome):
    found = judged(lambda attempt: result, Attempt("q", "r", "a"))
    assert found == expected
    assert type(found.acc) is float and type(found.score) is float


@pytest.mark.parametrize(
    ("result", "failure"),
    [
        ("1.0", "exception: TypeError: the reward function gave '1.0' of type str instead of a number"),
        (np.array([1.0, 2.0]), "exception: ValueError: "),
        ({"acc": True}, "exception: ValueError: the reward function gave a dict without 'score'; it has acc"),
        (float("-inf"), "-inf"),
        (-2e30, "too large: -2e+30 is beyond ±1e+30"),
    ],
)
def test_what_is_no_number_is_a_failure_and_no_score(result, failure: str):
    found = judged(lambda attempt: result, Attempt("q", "r", "a"))
    assert found.failure.startswith(failure)
    assert (found.score, found.acc, found.pred) == (0.0, False, "")
