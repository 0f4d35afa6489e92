"""Importance weights by hand; mismatch statistics that add up over ranks."""

import itertools
import math

import numpy as np
import pytest
import torch

from dapo_mcore.algo.correction import (
    check_mismatch,
    importance_metrics,
    importance_sums,
    importance_weights,
    mismatch_metrics,
    mismatch_stats,
    mismatch_warning,
)
from dapo_mcore.config.algo import TISConfig
from dapo_mcore.config.file import parse_config
from dapo_mcore.errors import ConfigError, RolloutError

RATIOS = torch.tensor([0.25, 0.5, 1.0, 1.5, 2.0, 3.0])


def weights(mode, **bounds):
    return importance_weights(RATIOS.log(), torch.zeros(6), TISConfig(mode=mode, **bounds))


def test_truncate_cuts_above_only():
    torch.testing.assert_close(weights("truncate"), torch.tensor([0.25, 0.5, 1.0, 1.5, 2.0, 2.0]))


def test_mask_is_symmetric_in_the_ratio():
    torch.testing.assert_close(weights("mask"), torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 0.0]))


def test_truncate_with_a_lower_bound_lifts_small_weights():
    torch.testing.assert_close(weights("truncate", lower=0.75), torch.tensor([0.75, 0.75, 1.0, 1.5, 2.0, 2.0]))
    torch.testing.assert_close(weights("truncate", lower=0.75, cap=None), RATIOS.clamp(min=0.75))
    torch.testing.assert_close(weights("truncate", cap=None), RATIOS)


def test_icepop_keeps_weights_between_its_bounds_and_no_others():
    """The bounds belong to what is kept. Without a lower one it is 1/cap; 0 switches it off."""
    torch.testing.assert_close(weights("icepop"), torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 0.0]))
    torch.testing.assert_close(weights("icepop", lower=1.0), torch.tensor([0.0, 0.0, 1.0, 1.5, 2.0, 0.0]))
    torch.testing.assert_close(weights("icepop", lower=0), torch.tensor([0.25, 0.5, 1.0, 1.5, 2.0, 0.0]))
    torch.testing.assert_close(weights("icepop", lower=1.5, cap=None), torch.tensor([0.0, 0.0, 0.0, 1.5, 2.0, 3.0]))
    torch.testing.assert_close(weights("mask", lower=1.0, cap=1.5), torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 0.0]))


LOWER = {"truncate": 0.0, "icepop": 1 / 1.1, "mask": 1 / 1.1}


@pytest.mark.parametrize("mode", LOWER)
@pytest.mark.parametrize(("lower", "cap"), [(None, 1.1), (0.9, 1.1), (0.5, 1.1), (0.9, None), (0.0, 1.1)])
def test_weights_are_those_of_the_formulas_of_slime_and_nemo_rl(mode, lower, cap):
    """slime 624b824: vanilla_tis_function, icepop_function, mis.clip; NeMo-RL 7ea279a: tis, icepop. By numpy, fp64."""
    actor, engine = sample_logprobs()
    w = np.exp(actor.double().numpy() - engine.double().numpy())
    low, high = LOWER[mode] if lower is None else lower, cap or np.inf
    inside = (w >= low) & (w <= high)
    expected = {"truncate": np.minimum(np.maximum(w, low), high), "icepop": np.where(inside, w, 0), "mask": inside}[
        mode
    ]
    found = importance_weights(actor.double(), engine.double(), TISConfig(mode=mode, lower=lower, cap=cap))
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-6)
    assert 0 < inside.mean() < 1


def test_a_weight_that_is_not_a_number_stays_one():
    """So the gradient step that it would spoil is skipped, and noticed."""
    found = importance_weights(torch.tensor([math.nan, 0.0]), torch.zeros(2), TISConfig(mode="icepop"))
    assert math.isnan(found[0]) and found[1] == 1


@pytest.mark.parametrize(
    ("tis", "reason"),
    [
        ({"mode": "icepop", "cap": 0.5}, r"mode icepop keeps .* at cap 0\.5; use a cap of at least 1, or set lower"),
        ({"mode": "truncate", "lower": 3.0}, r"lower 3\.0 exceeds cap 2\.0, so no weight lies between them; exchange"),
        (
            {"mode": "icepop", "lower": 0.0, "cap": None},
            "mode icepop has neither lower nor cap, so it keeps all tokens",
        ),
        ({"mode": "mask", "cap": None}, "mode mask has neither lower nor cap"),
    ],
)
def test_bounds_that_keep_all_or_nothing_are_refused_in_the_configuration(tis, reason):
    tree = {"model": {"path": "m"}, "data": {"files": ["a"]}, "algo": {"tis": tis}}
    with pytest.raises(ConfigError, match=reason):
        parse_config(tree)


def test_off_is_none():
    assert weights("off") is None


def test_weights_are_detached_and_the_exponent_is_clamped():
    old = torch.tensor([1e4, -1e4], requires_grad=True)
    result = importance_weights(old, torch.zeros(2), TISConfig(mode="truncate", cap=None))
    assert not result.requires_grad
    torch.testing.assert_close(result, torch.tensor([20.0, -20.0]).exp())


def test_what_truncation_does_by_hand():
    """Ratios 0.25 0.5 1 1.5 2 3: the last is cut to 2, and the weight 2 is left as it is."""
    metrics = importance_metrics(importance_sums(RATIOS.log(), torch.zeros(6), TISConfig(mode="truncate", cap=2.0)))
    assert metrics == pytest.approx(
        {
            "tis/weight_mean_before": 8.25 / 6,
            "tis/weight_mean_after": 7.25 / 6,
            "tis/truncated_ratio": 1 / 6,
            "tis/effective_sample_size": 7.25**2 / (6 * (0.0625 + 0.25 + 1 + 2.25 + 4 + 4)),
        },
        rel=1e-6,
    )


def test_both_bounds_count_as_truncation():
    """Ratios 0.25 0.5 1 1.5 2 3 in [0.75, 2]: two are lifted and one is cut."""
    found = importance_metrics(importance_sums(RATIOS.log(), torch.zeros(6), TISConfig(mode="truncate", lower=0.75)))
    assert list(found.values())[1:3] == pytest.approx([8 / 6, 3 / 6], rel=1e-6)
    found = importance_metrics(importance_sums(RATIOS.log(), torch.zeros(6), TISConfig(mode="icepop", lower=0.75)))
    assert list(found.values())[1:] == pytest.approx([4.5 / 6, 3 / 6, 4.5**2 / 6 / 7.25], rel=1e-6)


def test_what_masking_does_by_hand():
    metrics = importance_metrics(importance_sums(RATIOS.log(), torch.zeros(6), TISConfig(mode="mask", cap=2.0)))
    assert list(metrics.values()) == pytest.approx([8.25 / 6, 4 / 6, 2 / 6, 4 / 6], rel=1e-6)
    nothing_left = importance_metrics(importance_sums(torch.ones(3), torch.zeros(3), TISConfig(mode="mask", cap=2.0)))
    assert nothing_left["tis/truncated_ratio"] == 1 and nothing_left["tis/effective_sample_size"] == 0


def test_equal_weights_are_a_whole_sample_and_one_that_has_all_is_one_token():
    def size(old, cap=1e9):
        return importance_metrics(importance_sums(old, torch.zeros(len(old)), TISConfig(mode="truncate", cap=cap)))[
            "tis/effective_sample_size"
        ]

    assert size(torch.full((8,), 0.7)) == pytest.approx(1)
    assert size(torch.tensor([15.0, -15.0, -15.0, -15.0])) == pytest.approx(1 / 4)


@pytest.mark.parametrize("mode", ["truncate", "icepop", "mask"])
def test_importance_sums_of_micro_batches_and_ranks_add_up(mode):
    actor, engine = sample_logprobs()
    whole = importance_metrics(importance_sums(actor, engine, TISConfig(mode=mode, cap=1.02)))
    cuts = [0, 0, 7, 9000, 20_000]  # one rank holds nothing
    parts = [
        importance_sums(actor[a:b], engine[a:b], TISConfig(mode=mode, cap=1.02)) for a, b in itertools.pairwise(cuts)
    ]
    assert importance_metrics(sum(parts[1:], parts[0])) == pytest.approx(whole, rel=1e-12)
    assert 0 < whole["tis/truncated_ratio"] < 1


def test_metrics_by_hand():
    actor, engine = torch.tensor([-1.0, -2.0], dtype=torch.float64), torch.tensor([-1.0, -2.1], dtype=torch.float64)
    metrics = mismatch_metrics(mismatch_stats(actor, engine))
    assert metrics["mismatch/logprob_diff_mean"] == pytest.approx(0.05)
    assert metrics["mismatch/logprob_diff_max"] == pytest.approx(0.1)
    assert metrics["mismatch/logprob_diff_p99"] == pytest.approx(0.1)
    assert metrics["mismatch/k3_kl"] == pytest.approx((math.exp(0.1) - 1 - 0.1) / 2, rel=1e-5)


def test_the_histogram_holds_the_share_of_each_decade():
    distances = [0.0, 5e-8, 2e-6, 0.03, 0.05, 0.09, 0.5, 500.0]
    engine = torch.zeros(8, dtype=torch.float64)
    metrics = mismatch_metrics(mismatch_stats(torch.tensor(distances, dtype=torch.float64), engine))
    shares = {name.removeprefix("mismatch/from_"): value for name, value in metrics.items() if "/from_" in name}
    assert list(shares) == ["0", *(f"1e{decade}" for decade in range(-7, 3))]
    filled = {name: value * 8 for name, value in shares.items() if value}
    assert filled == {"0": 2, "1e-6": 1, "1e-2": 3, "1e-1": 1, "1e2": 1}


def test_a_mismatch_beyond_the_limit_is_an_error_that_names_the_numbers():
    metrics = mismatch_metrics(mismatch_stats(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.1])))
    for limit in (None, 0.06):
        check_mismatch(metrics, limit)
    told = r"mean 0\.05 nats, p99 0\.1, maximum 0\.1, and k3 KL 0\.00259, but algo\.max_mismatch allows a mean of 0\.04"
    with pytest.raises(RolloutError, match=told):
        check_mismatch(metrics, 0.04)
    check_mismatch({}, 0.04)
    broken = mismatch_metrics(mismatch_stats(torch.tensor([float("nan")]), torch.zeros(1)))
    with pytest.raises(RolloutError, match="mean nan nats"):
        check_mismatch(broken, 1e9)


@pytest.mark.parametrize(
    ("distances", "told"),
    [
        ([0.1, 0.1], None),  # as much as is usual
        ([0.0, 0.24], "mean |log-prob difference| is 0.12 nats, p99 0.24, and more than 0.1 is"),
        ([float("nan")], "is nan nats"),
        ([], None),  # a step without loss tokens
    ],
)
def test_a_mismatch_that_is_no_rounding_is_told_in_one_line_with_the_limit_to_set(distances, told):
    actor = torch.tensor(distances, dtype=torch.float64)
    warning = mismatch_warning({"tis/weight_mean_after": 1.0, **mismatch_metrics(mismatch_stats(actor, 0 * actor))})
    if told is None:
        assert warning is None
        return
    assert told in warning and "algo.max_mismatch=0.1" in warning and "\n" not in warning
    assert all(cause in warning for cause in ("weights that the server did not load", "dtype", "FP8"))


def test_where_the_mismatch_was_not_measured_nothing_is_told():
    assert mismatch_warning({"actor/loss": 1.0}) is None


def sample_logprobs(num_tokens=20_000):
    generator = torch.Generator().manual_seed(0)
    engine = -torch.rand(num_tokens, generator=generator)
    noise = torch.randn(num_tokens, generator=generator) * 0.02 * torch.rand(num_tokens, generator=generator).exp() ** 2
    return engine + noise, engine


def test_percentile_is_within_a_bin_of_the_exact_one_and_never_below():
    actor, engine = sample_logprobs()
    exact = (actor - engine).double().abs().sort().values[int(0.99 * 20_000) - 1].item()
    reported = mismatch_metrics(mismatch_stats(actor, engine))["mismatch/logprob_diff_p99"]
    assert exact <= reported <= exact * 10 ** (1 / 40)


def test_ranks_add_up_to_the_whole():
    actor, engine = sample_logprobs()
    whole = mismatch_metrics(mismatch_stats(actor, engine))
    cuts = [0, 0, 7, 9000, 20_000]  # one rank holds nothing
    parts = [mismatch_stats(actor[a:b], engine[a:b]) for a, b in itertools.pairwise(cuts)]
    assert mismatch_metrics(sum(parts[1:], parts[0])) == pytest.approx(whole, rel=1e-12)
    corrected = [
        mismatch_stats(actor[a:b], engine[a:b], TISConfig(mode="mask", cap=1.02)) for a, b in itertools.pairwise(cuts)
    ]
    correction = importance_metrics(importance_sums(actor, engine, TISConfig(mode="mask", cap=1.02)))
    assert mismatch_metrics(sum(corrected[1:], corrected[0])) == pytest.approx(whole | correction, rel=1e-12)


def test_a_bin_holds_what_lies_above_one_edge_and_up_to_the_next():
    edges = torch.logspace(-7, 2, 9 * 40 + 1, dtype=torch.float64)
    below, above = edges * (1 - 1e-9), edges * (1 + 1e-9)
    distances = torch.cat([torch.zeros(2), below, above, torch.tensor([1e300, math.inf, math.nan])])
    found = mismatch_stats(distances, torch.zeros_like(distances)).histogram
    assert found.tolist() == [3.0] + [2.0] * 360 + [4.0]


def test_extremes_land_in_the_outer_bins():
    same = torch.full((100,), -0.5)
    exact = mismatch_metrics(mismatch_stats(same, same))
    assert exact.pop("mismatch/from_0") == 1.0 and set(exact.values()) == {0.0}
    far = mismatch_metrics(mismatch_stats(same, same - 1e6))
    assert far["mismatch/from_1e2"] == 1.0
    assert far["mismatch/logprob_diff_p99"] == far["mismatch/logprob_diff_max"] == pytest.approx(1e6)


def test_no_tokens_give_no_metrics():
    assert importance_metrics(importance_sums(torch.zeros(0), torch.zeros(0), TISConfig(mode="mask", cap=2.0))) == {}
    assert importance_metrics(importance_sums(RATIOS, RATIOS, TISConfig(mode="off", cap=2.0))) == {}
    assert mismatch_metrics(mismatch_stats(torch.zeros(0), torch.zeros(0))) == {}
