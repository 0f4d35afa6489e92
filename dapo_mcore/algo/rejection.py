"""Rejection: which tokens are not trained on, because rollout engine and actor disagree about them or their response.

Change here: what a criterion measures, and how tokens and whole responses are judged. config/algo.py names the criteria.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from dapo_mcore.config.algo import RejectionConfig


def sample_sums(criterion: RejectionConfig, log_ratios: Tensor, sample_ids: Tensor, num_samples: int) -> Tensor:
    """Return fp64 [B], what `rejected` needs of each sample, summed over these tokens; ranks add theirs up with SUM.

    log_ratios  fp64 [L], log π_actor - log π_engine, clamped to ±20 (algo/correction.py).
    sample_ids  int64 [L], the sample of each token.
    """
    values = _measure(log_ratios, criterion.measure)
    if criterion.level == "every":
        values = _outside(values, *_bounds(criterion)).double()
    return values.new_zeros(num_samples).index_add_(0, sample_ids, values)


def rejected(
    criterion: RejectionConfig, log_ratios: Tensor, sample_ids: Tensor, sums: Tensor, num_loss_tokens: Tensor
) -> Tensor:
    """Return bool [L], the tokens that do not meet the criterion. Bounds belong to what is kept, and NaN is not rejected, so that it
    is noticed.

    sums             fp64 [B], `sample_sums` of all ranks.
    num_loss_tokens  int64 [B].

    Compares log r, Σ log r and its mean with the logarithms of the bounds, or k2 and k3, their sums and means with `upper`. Equal to
    compute_rollout_rejection_mask of verl b178a3c (trainer/ppo/rollout_corr_helper.py), whose token_kN, seq_sum_kN, seq_mean_kN
    and seq_max_kN are the levels token, sequence, geometric and every, except that the bounds of its k1 are those of 1/r: lower
    here is 1 over its upper. To slime 624b824 (examples/train_infer_mismatch_helper/mis.py): rs_level with bounds of r, and its
    rs_veto_threshold is level every with `lower`, both with algo.rejection_divisor all; slime clamps sums, not tokens. To NeMo-RL
    7ea279a (algorithms/loss/loss_functions.py): seq-mask-tis is level geometric with rejection_divisor all, beside algo.tis mode
    truncate with cap null; rejected responses keep their KL there.
    Example: a response with ratios 2 and 1/8 has product 1/4 and geometric mean 1/2; at level every with lower 0.2 it goes.
    """
    low, high = _bounds(criterion)
    if criterion.level == "token":
        return _outside(_measure(log_ratios, criterion.measure), low, high)
    if criterion.level == "every":
        return (sums > 0).index_select(0, sample_ids)
    found = sums / num_loss_tokens.clamp(min=1) if criterion.level == "geometric" else sums
    return _outside(found, low, high).index_select(0, sample_ids)


def _measure(log_ratios: Tensor, measure: Literal["ratio", "k2", "k3"]) -> Tensor:
    if measure == "ratio":
        return log_ratios
    return log_ratios.square() / 2 if measure == "k2" else log_ratios.expm1() - log_ratios


def _bounds(criterion: RejectionConfig) -> tuple[float, float]:
    """Return the lower and the upper bound of what is compared; infinite without one."""
    low = -math.inf if criterion.lower is None else math.log(criterion.lower)
    if criterion.upper is None:
        return low, math.inf
    return low, math.log(criterion.upper) if criterion.measure == "ratio" else criterion.upper


def _outside(values: Tensor, low: float, high: float) -> Tensor:
    return (values < low) | (values > high)
