"""Group-relative advantages.

Change here: baseline and scale of a reward inside its group. A group is known by its number, never by its text.
"""

from __future__ import annotations

from typing import Literal

import numpy as np


def group_advantages(
    rewards: np.ndarray,
    group_ids: np.ndarray,
    in_statistics: np.ndarray,
    *,
    std: Literal["unbiased", "biased", "others", "none"] = "unbiased",
    baseline: Literal["mean", "leave-one-out"] = "mean",
    eps: float = 1e-6,
) -> np.ndarray:
    """Return float64 [B], the advantage `(R - baseline) / (std + eps)` of every sample (DAPO, arXiv 2503.14476, eq. 9).

    rewards        float64 [B], with the overlong penalty; may be NaN where in_statistics is False.
    group_ids      int64 [B], equal numbers are one group, in any order.
    in_statistics  bool [B]; a sample with False gets 0 and does not change its group.
    std            of the whole group with divisor n - 1 (`unbiased`, as verl) or n (`biased`); of the *other* samples with divisor
                   n - 2 (`others`), where a sample whose others are equal is not scaled; or neither scaling nor eps (`none`).
    baseline       the group's mean, or the mean of the *other* samples. The latter without std is RLOO (arXiv 2402.14740), as verl's
                   `rloo` and NeMo-RL's; with std `others` it is NeMo-RL's default (7ea279a, algorithms/advantage_estimator.py),
                   whose group of one gets 0.

    A group sampled with size one has baseline 0 and std 1, as in verl. The only valid sample of a larger group gets 0:
    it has no baseline without the others (in verl no sample can fail, so it has no such group). A group of equal
    rewards gets exactly 0, even if eps is 0.
    Example: rewards [1, 1, -1, -1] in one group have mean 0 and std 1.1547, so advantages ±0.8660.
    """
    advantages = np.zeros(len(rewards), dtype=np.float64)
    valid = np.asarray(in_statistics, dtype=bool)
    _, group, num_sampled = np.unique(group_ids, return_inverse=True, return_counts=True)
    num_valid = np.bincount(group, valid)
    compared = valid & ((num_valid > 1) | (num_sampled == 1))[group]
    if compared.any():
        values = np.asarray(rewards, np.float64)[compared]
        advantages[compared] = _advantages(values, group_ids[compared], std, baseline, eps)
    return advantages


def whitened(advantages: np.ndarray, num_loss_tokens: np.ndarray) -> np.ndarray:
    """Return float64 [B]: (A - mean) / √(variance + 1e-8), both over all loss tokens; a sample without loss tokens gets 0.

    The variance has the divisor N - 1, with N the number of loss tokens; fewer than two are left as they are.
    Equals masked_whiten of verl (utils/torch_functional.py) for advantages that are constant in a sample. REINFORCE++ with a group
    baseline (arXiv 2501.03262) is this of `R - group mean`: as in verl; as in slime without its option to subtract a multiple of
    each token's KL first; NeMo-RL's variance has the divisor N.
    Example: A = 1 with three tokens and A = -1 with one have mean 0.5 and variance (3 · 0.25 + 2.25) / 3 = 1.
    """
    tokens = np.asarray(num_loss_tokens, dtype=np.float64)
    total = tokens.sum()
    if total < 2:
        return np.asarray(advantages, dtype=np.float64)
    centred = advantages - (tokens @ advantages) / total
    variance = (tokens @ centred**2) / (total - 1)
    return np.where(tokens > 0, centred / np.sqrt(variance + 1e-8), 0.0)


def _advantages(rewards: np.ndarray, group_ids: np.ndarray, std: str, baseline: str, eps: float) -> np.ndarray:
    _, first, group = np.unique(group_ids, return_index=True, return_inverse=True)
    count = np.bincount(group)
    alone = (count == 1)[group]
    # Measured from the group's first reward, so that equal rewards cancel exactly instead of leaving rounding / eps.
    shifted = rewards - rewards[first][group]
    mean = np.bincount(group, shifted) / count
    centred = np.where(alone, rewards, shifted - mean[group])

    numerator = centred
    if baseline == "leave-one-out":
        # R - (S - R)/(n - 1) = (R - S/n) · n/(n - 1)
        numerator = np.where(alone, centred, centred * (count / np.maximum(count - 1, 1))[group])
    if std == "none":
        return numerator
    squares = np.bincount(group, centred**2)
    if std == "others":
        deviation = _deviation_of_others(centred, squares[group], count[group])
        return np.divide(numerator, deviation + eps, out=numerator.copy(), where=deviation > 0)
    divisor = np.maximum(count - 1, 1) if std == "unbiased" else count
    scale = np.where(alone, 1.0, np.sqrt(squares / divisor)[group]) + eps
    return np.divide(numerator, scale, out=np.zeros_like(numerator), where=scale > 0)


def _deviation_of_others(centred: np.ndarray, squares: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return the standard deviation of each sample's others, divisor n - 2; 0 where these are equal or fewer than two."""
    # Without a sample at distance d from the mean, the sum of squares around the new mean is less by d² · n / (n - 1).
    left = squares - centred**2 * count / np.maximum(count - 1, 1)
    left[left <= 1e-12 * squares] = 0.0  # rounding, where the others are equal
    return np.sqrt(left / np.maximum(count - 2, 1))
