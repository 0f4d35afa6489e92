"""Reference KL inside the reward: KL(π_θ ‖ π_ref), estimated on tokens that π_θ sampled. Off by default, as in the paper.

Change here: how a sample's KL changes its reward. The estimators k1, k2 and k3 of one token are kl_terms in
kernels/policy_loss/torch_path.py, for the loss and for the reward.
"""

from __future__ import annotations

import numpy as np


def penalised_rewards(rewards: np.ndarray, kl_sums: np.ndarray, coef: float) -> np.ndarray:
    """Return float64 [B]: the rewards minus coef times each sample's KL, summed over its loss tokens (nats)."""
    return np.asarray(rewards, np.float64) - coef * np.asarray(kl_sums, np.float64)
