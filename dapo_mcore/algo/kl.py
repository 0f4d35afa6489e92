"""KL to the reference policy, per token or inside the reward. Off by default, as in the paper.

Change here: the estimators. Source: J. Schulman, "Approximating KL Divergence" (2020), joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

LOG_RATIO_LIMIT = 20.0


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, kind: Literal["k1", "k2", "k3"]) -> torch.Tensor:
    """Tensor of the inputs' shape: estimates of KL(policy ‖ reference) in nats, from tokens the policy sampled.

    With d = log p_ref - log p, clamped to ±20: k1 = -d (unbiased, may be negative), k2 = d²/2, k3 = e^d - 1 - d
    (unbiased, never negative). Differentiable in `logprobs`. As a loss term only k2 has the gradient of the KL on average:
    k1's is 0, and k3's is that of the reverse KL.
    """
    log_ratio = (ref_logprobs - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    return log_ratio.expm1() - log_ratio


def penalised_rewards(rewards: np.ndarray, kl_sums: np.ndarray, coef: float) -> np.ndarray:
    """float64 [B], rewards minus coef times each sample's KL summed over its loss tokens (nats)."""
    return np.asarray(rewards, np.float64) - coef * np.asarray(kl_sums, np.float64)
