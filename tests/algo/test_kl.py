"""The KL inside the reward."""

import numpy as np

from dapo_mcore.algo.kl import penalised_rewards


def test_penalised_rewards():
    np.testing.assert_allclose(penalised_rewards(np.array([1.0, -1.0]), np.array([2.0, 0.5]), 0.1), [0.8, -1.05])
