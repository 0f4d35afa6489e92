"""Group advantages against numbers worked out by hand and a per-group fp64 loop."""

import numpy as np
import pytest

from dapo_mcore.algo.advantage import group_advantages, whitened


def advantages(rewards, ids=None, valid=None, **options):
    rewards = np.array(rewards, dtype=np.float64)
    ids = np.zeros(len(rewards), np.int64) if ids is None else np.array(ids)
    valid = np.ones(len(rewards), bool) if valid is None else np.array(valid)
    return group_advantages(rewards, ids, valid, **options)


def test_paper_formula_by_hand():
    # mean 0, unbiased variance (1 + 1 + 1 + 1) / 3 = 4/3
    std = np.sqrt(4 / 3)
    expected = np.array([1, 1, -1, -1]) / (std + 1e-6)
    np.testing.assert_allclose(advantages([1, 1, -1, -1]), expected, rtol=1e-14)


def test_options_by_hand():
    rewards = [3, 0, 0]  # mean 1, deviations 2, -1, -1, squares sum to 6
    np.testing.assert_allclose(advantages(rewards, eps=0.0), np.array([2, -1, -1]) / np.sqrt(3), rtol=1e-14)
    np.testing.assert_allclose(advantages(rewards, std="biased", eps=0.0), np.array([2, -1, -1]) / np.sqrt(2))
    np.testing.assert_allclose(advantages(rewards, std="none"), [2, -1, -1])
    # leave-one-out baselines: (0 + 0)/2 = 0 for the first, (3 + 0)/2 = 1.5 for the others
    np.testing.assert_allclose(advantages(rewards, std="none", baseline="leave-one-out"), [3, -1.5, -1.5])
    np.testing.assert_allclose(
        advantages(rewards, baseline="leave-one-out", eps=0.0), np.array([3, -1.5, -1.5]) / np.sqrt(3)
    )


def test_std_of_others_is_nemo_rls_formula():
    # others of 3 are [0, 1], with mean 1/2 and variance 1/2; of 0 they are [3, 1]: 2 and 2; of 1 they are [3, 0]: 3/2 and 9/2
    expected = np.array([2.5, -2, -0.5]) / np.sqrt([0.5, 2, 4.5])
    np.testing.assert_allclose(advantages([3, 0, 1], std="others", baseline="leave-one-out", eps=0.0), expected)
    # the others of the only right one are equal, so it is not scaled; those of a wrong one are [1, 0, 0], with variance 1/3
    found = advantages([1, 0, 0, 0], std="others", baseline="leave-one-out")
    np.testing.assert_allclose(found, [1, *3 * [-1 / 3 / (np.sqrt(1 / 3) + 1e-6)]], rtol=1e-14)
    rng = np.random.default_rng(2)
    ids, rewards = rng.permutation(np.repeat([0, 1, 2, 3], [2, 5, 3, 9])), rng.normal(size=19)
    nemo_rl = np.zeros(19)
    for i in range(19):
        others = rewards[(ids == ids[i]) & (np.arange(19) != i)]
        scale = others.std(ddof=1) + 1e-6 if len(others) > 1 else 1
        nemo_rl[i] = (rewards[i] - others.mean()) / scale
    np.testing.assert_allclose(advantages(rewards, ids, std="others", baseline="leave-one-out"), nemo_rl, rtol=1e-10)


@pytest.mark.parametrize("reward", [0.1, 1 / 3, -7.3e5])
def test_rounding_is_no_deviation_of_others(reward):
    found = advantages([reward + 1, *[reward] * 6], std="others", baseline="leave-one-out", eps=0.0)
    np.testing.assert_allclose(found[0], 1, rtol=1e-9)


def test_group_of_one_has_mean_0_and_std_1():
    np.testing.assert_allclose(advantages([0.5, -1.0], ids=[0, 1]), [0.5 / (1 + 1e-6), -1 / (1 + 1e-6)], rtol=1e-14)
    np.testing.assert_array_equal(advantages([0.5], std="none", baseline="leave-one-out"), [0.5])


@pytest.mark.parametrize("broken", [np.nan, np.inf, 1e9])
def test_failed_sample_gets_0_and_leaves_its_group_alone(broken):
    with_failure = advantages([1, broken, -1, 1], valid=[True, False, True, True])
    assert with_failure[1] == 0
    np.testing.assert_array_equal(with_failure[[0, 2, 3]], advantages([1, -1, 1]))


@pytest.mark.parametrize("baseline", ["mean", "leave-one-out"])
@pytest.mark.parametrize("std", ["unbiased", "biased", "others", "none"])
def test_one_valid_sample_of_a_larger_group_has_no_baseline_and_gets_0(std, baseline):
    # group 0 lost all but one sample, group 1 was sampled with size one, group 2 lost one of three
    rewards, ids = [2, np.nan, np.nan, 2, 1, np.nan, 1], [0, 0, 0, 1, 2, 2, 2]
    valid = [True, False, False, True, True, False, True]
    expected = [0, 0, 0, 2 if std in ("none", "others") else 2 / (1 + 1e-6), 0, 0, 0]
    np.testing.assert_allclose(advantages(rewards, ids, valid, std=std, baseline=baseline), expected, rtol=1e-14)


def test_whitening_counts_every_loss_token():
    np.testing.assert_allclose(whitened(np.array([1.0, -1.0]), np.array([3, 1])), np.array([0.5, -1.5]), rtol=1e-7)
    # verl's formula, token by token, with an empty sample among the others
    values, tokens = np.array([0.3, -2.0, 9.0, 1.1]), np.array([5, 2, 0, 7])
    spread = np.repeat(values, tokens)
    expected = (values - spread.mean()) / np.sqrt(spread.var(ddof=1) + 1e-8) * (tokens > 0)
    np.testing.assert_allclose(whitened(values, tokens), expected, rtol=1e-14)
    np.testing.assert_array_equal(whitened(np.array([2.0, 3.0]), np.array([0, 1])), [2.0, 3.0])


def test_rloo_is_that_of_verl_and_nemo_rl():
    rng = np.random.default_rng(1)
    ids = rng.permutation(np.repeat([0, 1, 2, 3], [2, 5, 1, 9]))
    rewards = rng.normal(size=len(ids))
    verl, nemo_rl = np.zeros((2, len(ids)))
    for group in range(4):
        own, n = rewards[ids == group], (ids == group).sum()
        verl[ids == group] = (own - own.mean()) * n / (n - 1) if n > 1 else own
        nemo_rl[ids == group] = own - (own.sum() - own) / (n - 1) if n > 1 else 0
    found = advantages(rewards, ids, std="none", baseline="leave-one-out")
    np.testing.assert_allclose(found, verl, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(found[ids != 2], nemo_rl[ids != 2], rtol=1e-12, atol=1e-14)


def test_reinforce_with_a_group_baseline_is_that_of_the_peers_on_multi_turn_samples():
    """By their masked tensors of [samples, tokens]. A tool's tokens have the advantage 100 there."""
    rng = np.random.default_rng(2)
    ids, mask = np.repeat([0, 1, 2], [4, 4, 2]), rng.random((10, 30)) < 0.4
    mask[3] = False
    rewards = rng.normal(size=10)
    centred = rewards - np.array([rewards[ids == group].mean() for group in ids])
    tokens = np.where(mask, centred[:, None], 100.0)
    count = mask.sum()
    mean = (tokens * mask).sum() / count
    squares = ((tokens - mean) ** 2 * mask).sum()
    found = whitened(advantages(rewards, ids, std="none"), mask.sum(1))
    for divisor, factor in ((count - 1, 1.0), (count, np.sqrt(count / (count - 1)))):  # verl and slime; NeMo-RL
        theirs = (tokens - mean) / np.sqrt(squares / divisor + 1e-8) * mask
        np.testing.assert_allclose(factor * found[:, None] * mask, theirs, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("std", ["unbiased", "biased", "none"])
def test_uniform_group_is_exactly_zero(std, eps):
    # 0.1 + 0.1 + 0.1 divided by 3 is not 0.1 in binary: a plain mean would leave rounding to be divided by eps
    np.testing.assert_array_equal(advantages([0.1] * 3, std=std, eps=eps), [0, 0, 0])


def test_nothing_valid_gives_zeros():
    np.testing.assert_array_equal(advantages([np.nan, 1.0], valid=[False, False]), [0, 0])


@pytest.mark.parametrize("baseline", ["mean", "leave-one-out"])
@pytest.mark.parametrize("std", ["unbiased", "biased", "none"])
def test_interleaved_groups_of_unequal_size_match_a_loop(std, baseline):
    rng = np.random.default_rng(0)
    ids = rng.permutation(np.repeat([7, 3, 11, 5], [2, 16, 1, 9]))
    rewards, valid = rng.normal(size=28), rng.random(28) > 0.2

    expected = np.zeros(28)
    for group in np.unique(ids):
        members = [i for i in range(28) if ids[i] == group and valid[i]]
        for i in members if len(members) > 1 or (ids == group).sum() == 1 else []:
            values = rewards[members]
            others = [rewards[j] for j in members if j != i]
            center = 0.0 if not others else np.mean(others if baseline == "leave-one-out" else values)
            scale = 1.0 if not others else np.std(values, ddof=int(std == "unbiased"))
            expected[i] = (rewards[i] - center) / (1.0 if std == "none" else scale + 1e-6)

    actual = group_advantages(rewards, ids, valid, std=std, baseline=baseline)
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-14)
