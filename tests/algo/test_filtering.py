"""Which groups dynamic sampling keeps."""

from dataclasses import replace

import numpy as np
import pytest

from dapo_mcore.algo.filtering import classify, group_varies
from dapo_mcore.types import Group, Prompt, Rollout, Sample, Score

R, W, FAILED, ABORTED = "right", "wrong", "failed", "aborted"


def make_sample(kind, penalty=0.0):
    rollout = Rollout(
        np.array([1, 2], np.int32), np.zeros(2, np.float32), np.ones(2, bool), "abort" if kind == ABORTED else "stop", 0
    )
    right = kind in (R, ABORTED)
    score = 1.0 if right else -1.0
    failure = "timeout" if kind == FAILED else None
    return Sample(rollout, "", Score(score + penalty, score, right, "", penalty, failure, failure is not None))


def make_group(*kinds, penalties=None):
    penalties = penalties or [0.0] * len(kinds)
    prompt = Prompt("train:0", np.array([5], np.int32), "", "")
    return Group(prompt, tuple(map(make_sample, kinds, penalties)))


@pytest.mark.parametrize(
    ("kinds", "kind", "varies"),
    [
        ((R, W), "mixed", True),
        ((R, R, R, W), "mixed", True),
        ((R, R), "all_right", False),
        ((W, W), "all_wrong", False),
        ((FAILED, FAILED), "unscored", False),
        ((R, R, FAILED), "all_right", False),  # a failure is not a wrong answer
        ((W, W, ABORTED), "all_wrong", False),  # an aborted answer is not a right one
        ((R, W, FAILED), "mixed", True),
        ((R, FAILED), "all_right", False),  # one valid sample of two: nothing to compare with
        ((R,), "all_right", True),  # sampled once: kept, as verl does
        ((W,), "all_wrong", True),
        ((FAILED,), "unscored", False),
    ],
)
def test_truth_table(kinds, kind, varies):
    group = make_group(*kinds)
    assert (classify(group), group_varies(group)) == (kind, varies)


@pytest.mark.parametrize("answer", [R, W])
def test_overlong_penalty_cannot_make_a_uniform_group_pass(answer):
    group = make_group(answer, answer, answer, penalties=[0.0, -0.25, -1.0])
    assert np.std([sample.score.reward for sample in group.samples]) > 0
    assert not group_varies(group)


@pytest.mark.parametrize(
    ("accs", "kind"),
    [((0.2, 1.0), "mixed"), ((0.2, 0.2), "all_wrong"), ((0.0, 0.2), "mixed"), ((0.5, 0.5), "all_right")],
)
def test_more_and_less_credit_varies(accs, kind):
    samples = [make_sample(R) for _ in accs]
    graded = [replace(sample, score=replace(sample.score, acc=acc)) for sample, acc in zip(samples, accs)]
    assert classify(replace(make_group(R), samples=tuple(graded))) == kind


def test_penalty_cannot_hide_a_mixed_group():
    group = make_group(R, W, penalties=[-2.0, 0.0])
    assert np.std([sample.score.reward for sample in group.samples]) == 0
    assert group_varies(group)
