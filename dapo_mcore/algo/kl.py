"""KL to the reference policy inside the reward. Off by default, as in the paper.

Change here: how a sample's KL enters its reward. What one token's estimate is, in the loss and in the reward alike, is
kl_terms of kernels/policy_loss/reference.py.
"""

from __future__ import annotations

import numpy as np


def penalised_rewards(rewards: np.ndarray, kl_sums: np.ndarray, coef: float) -> np.ndarray:
    """float64 [B], rewards minus coef times each sample's KL summed over its loss tokens (nats)."""
    return np.asarray(rewards, np.float64) - coef * np.asarray(kl_sums, np.float64)
