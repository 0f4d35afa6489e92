"""Token weights by hand, and against the formula of each mode written out over padded fp64 losses."""

import numpy as np
import pytest

from dapo_mcore.algo.loss import balance_weights, sample_weights

MODES = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "token-mean-microbatch"]
TOKENS = np.array([4, 1, 0, 3])
MICRO = np.array([0, 1, 1, 0])
OPTIONS = {"micro_batch_ids": MICRO, "loss_length": 10}


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token-mean", [1 / 8, 1 / 8, 0, 1 / 8]),
        ("seq-mean-token-mean", [1 / 12, 1 / 3, 0, 1 / 9]),
        ("seq-mean-token-sum", [1 / 3, 1 / 3, 0, 1 / 3]),
        ("seq-mean-token-sum-norm", [1 / 30, 1 / 30, 0, 1 / 30]),
        # micro-batch 0: 2 of 4 samples, 7 tokens; micro-batch 1: 2 of 4 samples (one is empty), 1 token
        ("token-mean-microbatch", [0.5 / 7, 0.5, 0, 0.5 / 7]),
    ],
)
def test_by_hand(mode, expected):
    np.testing.assert_allclose(sample_weights(mode, TOKENS, **OPTIONS), expected, rtol=1e-15)


def test_load_balancing_counts_samples_with_loss_tokens_and_divides_by_their_squared_length():
    found = balance_weights(TOKENS, np.array([5, 10, 7, 4]))
    np.testing.assert_allclose(found, [1 / (3 * 25), 1 / (3 * 100), 0, 1 / (3 * 16)], rtol=1e-15)
    assert balance_weights(np.array([0]), np.array([3])).tolist() == [0.0]


def direct_loss(mode, losses, mask, micro, loss_length):
    """Return the scalar that defines each mode, over a padded rectangle [n, t]."""
    tokens = mask.sum(1)
    sums = (losses * mask).sum(1)
    kept = tokens > 0
    if mode == "token-mean":
        return sums.sum() / tokens.sum()
    if mode == "seq-mean-token-mean":
        return np.mean(sums[kept] / tokens[kept])
    if mode == "seq-mean-token-sum":
        return np.mean(sums[kept])
    if mode == "seq-mean-token-sum-norm":
        return np.mean(sums[kept] / loss_length)
    total = 0.0
    for number in set(micro.tolist()):  # verl: masked mean of the micro-batch · its samples / samples of the mini-batch
        members = micro == number
        if mask[members].sum():
            total += losses[members][mask[members]].mean() * members.sum() / len(losses)
    return total


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(5))
def test_weighted_sum_equals_the_direct_formula(mode, seed):
    rng = np.random.default_rng(seed)
    losses, mask = rng.normal(size=(13, 9)), rng.random((13, 9)) > 0.6
    mask[[2, 7]] = False
    micro = rng.integers(10, 14, 13)
    weights = sample_weights(mode, mask.sum(1), micro_batch_ids=micro, loss_length=9)
    expected = direct_loss(mode, losses, mask, micro, 9)
    assert (weights[:, None] * losses * mask).sum() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_all_masked_mini_batch_is_all_zeros(mode):
    np.testing.assert_array_equal(sample_weights(mode, np.zeros(4, np.int64), **OPTIONS), np.zeros(4))


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"])
def test_masked_samples_and_micro_batches_change_nothing(mode):
    alone = sample_weights(mode, TOKENS[[0, 1, 3]], loss_length=10)
    among_masked = sample_weights(mode, TOKENS, micro_batch_ids=np.arange(4), loss_length=10)
    np.testing.assert_array_equal(among_masked[[0, 1, 3]], alone)


def test_count_is_exact_beyond_float32():
    tokens = np.array([2**24, 1, 1])
    assert sample_weights("token-mean", tokens)[0] == 1 / (2**24 + 2)
