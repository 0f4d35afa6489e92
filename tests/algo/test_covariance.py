"""Covariances, candidates and keys by hand."""

import numpy as np

from dapo_mcore.algo.covariance import ascending_keys, candidates, covariances, drawn_keys, num_selected
from dapo_mcore.config.algo import AlgoConfig

A = np.array([1.0, 1.0, -1.0, -1.0])


def test_covariance_is_the_product_of_both_distances():
    found = covariances(np.array([-0.5, -1.5, -0.5, -1.5]), A, -1.0, 0.0)
    assert found.tolist() == [0.5, -0.5, -0.5, 0.5]


def test_the_number_is_rounded_down_and_at_least_one():
    assert [num_selected(0.0002, n) for n in (10, 9_999, 10_000, 12_000)] == [1, 1, 2, 2]


def test_clip_cov_takes_what_lies_between_the_bounds_and_still_has_a_gradient():
    algo = AlgoConfig(policy_loss="clip_cov")
    covariance = np.array([1.0, 1.5, 4.9, 5.0])
    assert candidates(algo, covariance, None, A).tolist() == [False, True, True, False]
    ratios = np.array([0.0, 1.3, 0.7, 0.0])
    assert candidates(algo, covariance, np.log(np.maximum(ratios, 1e-9)), A).tolist() == [False] * 4
    assert candidates(algo, covariance, np.log([1.0, 0.7, 1.3, 1.0]), A).tolist() == [False, True, True, False]
    assert candidates(AlgoConfig(policy_loss="kl_cov"), covariance, None, A).all()


def test_keys_order_as_their_numbers():
    values = np.array([-np.inf, -3.0, -1e-300, 0.0, 1e-300, 2.0, np.inf])
    assert (np.diff(ascending_keys(values).astype(object)) > 0).all()
    assert ascending_keys(np.array([-0.0])) == ascending_keys(np.array([0.0]))
    assert ascending_keys(np.array([np.nan])) == ascending_keys(np.array([np.inf]))


def test_a_draw_is_the_same_for_a_place_and_another_for_the_next_draw():
    places = np.arange(10_000, dtype=np.int64)
    first, second = drawn_keys(places, 5), drawn_keys(places, 6)
    assert len(np.unique(first)) == len(places) and np.array_equal(first[77:80], drawn_keys(places[77:80], 5))
    assert abs(np.corrcoef(first.astype(float), second.astype(float))[0, 1]) < 0.05
    assert drawn_keys(np.array([0]), 0)[0] == 0xE220A8397B1DCDAF  # SplitMix64's first number for seed 0
