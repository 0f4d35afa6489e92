"""The DAPO objective of one token, or of a block of tokens, in Triton: a part of the kernels in kernel.py.

Change here: only together with torch_path.policy_loss_terms, whose formula this file repeats.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import records

LOG_RATIO_LIMIT = tl.constexpr(records.LOG_RATIO_LIMIT)
K3_LIMIT = tl.constexpr(records.K3_LIMIT)


@triton.jit
def token_terms(logprob, tokens, at, mask, objective, KL: tl.constexpr):
    """Return the fields of TokenTerms for the tokens `at`, by the formula of torch_path.policy_loss_terms."""
    advantage = tl.load(tokens.advantages + at, mask=mask)
    if tokens.old_logprobs is None:
        log_ratio = logprob - logprob
    else:
        log_ratio = logprob - tl.load(tokens.old_logprobs + at, mask=mask)
    ratio = tl.exp(tl.clamp(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT, propagate_nan=tl.PropagateNan.ALL))
    unclipped = -advantage * ratio
    in_range = tl.clamp(ratio, objective.ratio_low, objective.ratio_high, propagate_nan=tl.PropagateNan.ALL)
    clipped = -advantage * in_range
    negative = advantage < 0
    dual = negative & False
    if objective.cispo is not None:
        loss, slope = clipped * logprob, clipped
        low, high = ratio < objective.ratio_low, ratio > objective.ratio_high
    else:
        loss = tl.maximum(unclipped, clipped, propagate_nan=tl.PropagateNan.ALL)
        at_bound = clipped > unclipped
        if objective.dual_clip is not None:
            cap = -advantage * objective.dual_clip
            dual = negative & (loss > cap)
            loss = tl.where(dual, cap, loss)
        slope = tl.where(at_bound | dual | (tl.abs(log_ratio) > LOG_RATIO_LIMIT), 0.0, unclipped)
        low, high = at_bound & negative, at_bound & (advantage >= 0)

    if tokens.old_kl_coefs is not None:
        coef = tl.load(tokens.old_kl_coefs + at, mask=mask)
        loss += coef * tl.abs(log_ratio)
        slope += tl.where(log_ratio > 0, coef, tl.where(log_ratio < 0, -coef, 0.0))
    if tokens.tis_weights is not None:
        tis = tl.load(tokens.tis_weights + at, mask=mask)
        loss *= tis
        slope *= tis
    kl = tl.zeros_like(loss)
    if tokens.ref_logprobs is not None:
        kl, kl_slope = kl_terms(logprob - tl.load(tokens.ref_logprobs + at, mask=mask), KL)
        loss += objective.kl_coef * kl
        slope += objective.kl_coef * kl_slope
    return loss, slope, ratio, low, high, dual, kl


@triton.jit
def kl_terms(log_ratio, KL: tl.constexpr):
    """Return torch_path.kl_terms."""
    if KL == "k1":
        return log_ratio, tl.zeros_like(log_ratio) + 1.0
    elif KL == "k2":
        return log_ratio * log_ratio / 2, log_ratio
    else:
        x = tl.clamp(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT, propagate_nan=tl.PropagateNan.ALL)
        excess = expm1(-x)
        value = excess + x
        cut = value > K3_LIMIT
        return tl.where(cut, K3_LIMIT, value), tl.where(cut, 0.0, -excess)


@triton.jit
def log1p(x):
    """Return log(1 + x), exact to rounding for small x: the quotient removes the rounding of 1 + x (Kahan)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))


@triton.jit
def expm1(x):
    """Return exp(x) - 1, exact to rounding for small x in the same way."""
    u = tl.exp(x)
    return tl.where(u == 1.0, x, tl.where(u - 1.0 == -1.0, -1.0, (u - 1.0) * x / tl.log(u)))
