"""KL-Cov and Clip-Cov: which tokens of a mini-batch are treated otherwise, by the covariance of log-prob and advantage.

Change here: what makes a token a candidate, and how many are chosen. actor/covariance_selection.py finds them over ranks.
Sources: arXiv 2505.22617; compute_policy_loss_kl_cov and compute_policy_loss_clip_cov of verl b178a3c (trainer/ppo/core_algos.py)
and of PRIME-RL/Entropy-Mechanism-of-RL 8850579, whose k_percent is 100 times our kl_cov.ratio. They choose within a micro-batch of
one rank, so that the objective depends on its size; we choose within the mini-batch over all ranks. Of equal covariances they take
any, and their draws depend on a rank's random state; both follow from a token's place here.
"""

from __future__ import annotations

import numpy as np

from dapo_mcore.config.algo import AlgoConfig

_SIGN = np.uint64(1 << 63)


def covariances(logprobs: np.ndarray, advantages: np.ndarray, mean_logprob: float, mean_advantage: float) -> np.ndarray:
    """Return fp64 [L], (log π - mean) · (A - mean) of tokens; the means are those of all loss tokens of the mini-batch."""
    return (np.asarray(logprobs, np.float64) - mean_logprob) * (np.asarray(advantages, np.float64) - mean_advantage)


def num_selected(ratio: float, num_tokens: int) -> int:
    """Return how many of the mini-batch's loss tokens are chosen: ⌊ratio · N⌋, at least 1.

    Example: 0.0002 of 12,000 tokens are 2.
    """
    return max(1, int(ratio * num_tokens))


def candidates(
    algo: AlgoConfig, covariance: np.ndarray, log_ratios: np.ndarray | None, advantages: np.ndarray
) -> np.ndarray:
    """Return bool [L], the tokens that may be chosen. KL-Cov: all. Clip-Cov: those with clip_cov.lower < covariance < upper, without
    those that PPO's clip has taken the gradient from.

    log_ratios  log π - log π_old; None where both are the same.
    """
    if algo.policy_loss == "kl_cov":
        return np.ones(len(covariance), bool)
    between = (covariance > algo.clip_cov.lower) & (covariance < algo.clip_cov.upper)
    if log_ratios is None:
        return between
    ratios = np.exp(log_ratios)
    below, above = ratios < 1 - algo.clip_low, ratios > 1 + algo.clip_high
    return between & ~((advantages < 0) & below) & ~((advantages > 0) & above)


def ascending_keys(values: np.ndarray) -> np.ndarray:
    """Return uint64 [L], which compare as the fp64 `values` do; NaN counts as the highest."""
    bits = np.where(np.isnan(values), np.inf, values + 0.0).view(np.uint64)  # + 0.0 makes one zero of two
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def drawn_keys(places: np.ndarray, draw: int) -> np.ndarray:
    """Return uint64 [L], a random number for each place (int64), the same for the same `draw` on any rank.

    Source: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
    """
    return _mix(places.astype(np.uint64) + np.uint64(((draw + 1) * 0x9E3779B97F4A7C15) % 2**64))


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
