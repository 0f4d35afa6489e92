from __future__ import annotations

import math
from dataclasses import replace

import pytest

from dapo_mcore.replay.compare import (
    Terms,
    Verdict,
    against,
    compare_digests,
    compare_metrics,
    compare_plans,
    compare_training,
)
from dapo_mcore.replay.record import Digest, Setting
from tests.replay.planted import step_record

EXACT = Terms(same_layout=True, exact=True, rounding=1e-4)
OTHER_LAYOUT = Terms(same_layout=False, exact=False, rounding=1e-4)
SETTING = Setting({"tensor": 2}, {"torch": "2.13"}, {"cpu": 2}, {"deterministic": "False"})


@pytest.mark.parametrize(
    ("change", "same_layout", "exact"),
    [({}, True, True), ({"layout": {"tensor": 1}}, False, False), ({"versions": {"torch": "2.14"}}, True, False)],
)
def test_bits_must_be_equal_only_if_every_setting_is(change, same_layout, exact):
    assert Terms.of(SETTING, replace(SETTING, **change), "fp32") == Terms(same_layout, exact, 1e-4)


def test_an_equal_step_has_equal_checks_in_causal_order():
    checks = compare_training(step_record(1), step_record(1), EXACT)
    assert [check.name for check in checks] == [
        *("plan", "old log-probs", "advantages"),
        *(f"update {number}: {what}" for number in (1, 2) for what in ("log-probs", "gradient", "metrics")),
        "weights after",
    ]
    assert {check.verdict for check in checks} == {Verdict.EQUAL}


def test_the_size_of_a_change_is_its_projection_relative_to_the_norm():
    """Two elements are swapped: the norm is the same, the projection tells how far the tensors are apart."""
    a = {"w": Digest("0" * 16, 2.0, 1.0), "v": Digest("1" * 16, 1.0, 0.0)}
    b = a | {"w": Digest("2" * 16, 2.0, 1.0 + 1e-5)}
    check = compare_digests("weights", a, b, OTHER_LAYOUT)
    assert check.verdict is Verdict.ROUNDING and check.size == pytest.approx(5e-6)
    assert check.place["tensor"] == check.place["worst_tensor"] == "w" and check.place["differing"] == 1
    assert compare_digests("weights", a, b, EXACT).verdict is Verdict.DIFFERS


def test_a_tensor_of_roundings_alone_is_measured_by_the_largest_one():
    """The gradient of a bias of keys is 0 but for rounding: 1e-9 of the largest norm, and never the same twice."""
    a = {"w": Digest("0" * 16, 1.0, 1.0), "bias": Digest("1" * 16, 1e-9, 1e-9)}
    b = {"w": Digest("0" * 16, 1.0, 1.0), "bias": Digest("2" * 16, 1e-9, -1e-9)}
    check = compare_digests("gradient", a, b, OTHER_LAYOUT)
    assert check.verdict is Verdict.ROUNDING and check.size == pytest.approx(2e-7)


def test_a_nan_and_a_missing_tensor_are_no_rounding():
    a, b = {"w": Digest("0" * 16, 1.0, 1.0)}, {"w": Digest("1" * 16, math.nan, math.nan)}
    assert compare_digests("weights", a, b, OTHER_LAYOUT).verdict is Verdict.DIFFERS
    check = compare_digests("weights", {}, a, OTHER_LAYOUT)
    assert (check.verdict, check.detail) == (Verdict.DIFFERS, "only the second run has w")


def test_bits_need_not_be_equal_where_a_run_does_not_repeat_them():
    gpus = replace(SETTING, devices={"NVIDIA H100": 2})
    assert not Terms.of(gpus, gpus, "bf16").exact
    deterministic = replace(gpus, flags={"deterministic": "True"})
    assert Terms.of(deterministic, deterministic, "bf16").exact


def test_metrics_are_relative_above_one_and_a_learning_rate_is_exact():
    a = {"tokens": 40.0, "loss": 0.001, "grad_norm": 50.0, "lr": 1e-6, "ratio": math.nan}
    assert compare_metrics("m", a, a, EXACT).verdict is Verdict.EQUAL
    close = a | {"loss": 0.00101, "grad_norm": 50.002}
    check = compare_metrics("m", a, close, OTHER_LAYOUT)
    assert check.verdict is Verdict.ROUNDING and check.size == pytest.approx(4e-5, rel=1e-3)
    assert check.detail == "loss 0.001 against 0.00101; 2 of 5 numbers differ"
    check = compare_metrics("m", a, close | {"lr": 1.0001e-6}, OTHER_LAYOUT)
    assert (check.verdict, check.place["metric"]) == (Verdict.DIFFERS, "lr")
    assert compare_metrics("m", a, a | {"grad_norm": math.nan}, OTHER_LAYOUT).verdict is Verdict.DIFFERS
    kl = compare_metrics("m", a | {"ppo_kl": 1e-4}, a | {"ppo_kl": -1e-4}, OTHER_LAYOUT)  # sums over 40 tokens
    assert kl.verdict is Verdict.ROUNDING and kl.size == pytest.approx(5e-6)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ([[[[0, 1]], [[2, 3]]]], "2 mini-batches against 1"),
        ([[[[0, 1]], [[2, 4]]], [[[3, 5]], [[6, 7]]]], "mini-batch 1: sample 3 only in the first run, as 1 other"),
        ([[[[0, 1]], [[3, 2]]], [[[4, 5]], [[6, 7]]]], "mini-batch 1, replica 1, micro-batch 1: samples 2, 3 against samples 3, 2"),
        ([[[[0, 1]], [[2, 3]]], [[[4], [5]], [[6, 7]]]], "mini-batch 2, replica 0, micro-batch 1: samples 4, 5 against samples 4"),
    ],
)  # fmt: skip
def test_plans_name_the_first_share_that_differs(other, words):
    plan = [[[[0, 1]], [[2, 3]]], [[[4, 5]], [[6, 7]]]]
    check = compare_plans(plan, other, EXACT)
    assert check.verdict is Verdict.DIFFERS and check.detail.startswith(words)


def test_another_layout_may_share_out_the_same_mini_batches():
    check = compare_plans([[[[0, 1]], [[2, 3]]]], [[[[0, 1, 2, 3]]]], OTHER_LAYOUT)
    assert (check.verdict, check.detail) == (Verdict.EQUAL, "1 mini-batch, in shares of 2 replicas against 1")


def test_numbers_are_told_with_as_many_digits_as_tell_them_apart():
    assert against(0.5, 0.25) == "0.5 against 0.25"
    assert against(1.0, 1.00000001) == "1 against 1.00000001"
    assert against(2.0, 2.0) == "2 in both"
