"""The coefficient's path by hand."""

import math

import pytest

from dapo_mcore.algo.adaptive_entropy import EntropyCoef
from dapo_mcore.config.algo import AdaptiveEntropyConfig

CONFIG = AdaptiveEntropyConfig(target=0.2, delta=1e-4, max_coef=5e-4)


def test_it_rises_below_the_target_and_falls_without_use_above_it():
    coef, path = EntropyCoef(2e-4), []
    for entropy in (0.1, 0.19, 0.2, 0.3, 0.1):
        coef = coef.after(entropy, CONFIG)
        path.append((coef.value, coef.used))
    expected = [(3e-4, 3e-4), (4e-4, 4e-4), (3e-4, 0), (2e-4, 0), (3e-4, 3e-4)]
    assert [number for pair in path for number in pair] == pytest.approx([n for pair in expected for n in pair])


def test_it_stays_between_its_limits():
    low, high = EntropyCoef(0.0).after(1.0, CONFIG), EntropyCoef(4.99e-4).after(0.1, CONFIG)
    assert (low, high) == (EntropyCoef(0.0, False), EntropyCoef(5e-4, True))


def test_an_entropy_that_is_not_finite_changes_nothing():
    assert EntropyCoef(2e-4, False).after(math.nan, CONFIG) == EntropyCoef(2e-4, False)
