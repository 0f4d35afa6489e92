"""The policy loss in PyTorch: the DAPO objective per token, its derivative in closed form, and the gradient to logits.

Change here: the formula per token; token_terms.py repeats it in Triton and must change with it. Training uses this file
on a CPU, for fp64 and without Triton. It offers the three functions of every implementation (dispatch.py):
`score`, `differentiate` and `token_losses`. policy_head/reference.py defines the same loss by autograd for the tests.
Source: DAPO (arXiv 2503.14476) eq. 8, with separate clip ranges, and dual clip (arXiv 1912.09729) as an option.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .records import (
    K3_LIMIT,
    LOG_RATIO_LIMIT,
    KLEstimator,
    Objective,
    PolicyHeadOutput,
    TokenInputs,
    TokenTerms,
    compute_dtype,
)
from .shard import VocabShard
from .softmax import Softmax, logit_gradient, target_softmax


def policy_loss_terms(logprobs: Tensor, tokens: TokenInputs, objective: Objective) -> TokenTerms:
    """Return the objective of each token and its derivative to `logprobs` [T], all in the dtype of `logprobs`.

    The policy term is max(-A·r, -A·clip(r)) with r = exp(clamp(logp - old, ±20)), times the token's TIS weight. Its
    derivative is -A·r where -A·r is the larger term, and 0 where a bound is reached or outside the ±20 clamp.
    If r lies exactly on a clip bound the token counts as not clipped and its derivative is -A·r. (The one-sided
    derivatives differ there, and any value between them is a subgradient.)
    With form cispo (arXiv 2506.13585 eq. 4) the term is -A·clip(r)·logp and its derivative -A·clip(r): r is a constant. The
    paper clips above only, which is clip_low 1; verl, slime and NeMo-RL clip at 0.8 and 1.2 by default.
    With old_kl_coefs the policy term has coef · |logp - old| more, with derivative coef · sign(logp - old), before the TIS weight
    multiplies it: as compute_policy_loss_kl_cov of verl b178a3c (trainer/ppo/core_algos.py).
    """
    advantages = tokens.advantages
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    old = logprobs if tokens.old_logprobs is None else tokens.old_logprobs
    log_ratio = logprobs - old
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(low, high)
    dual = torch.zeros_like(advantages, dtype=torch.bool)
    if objective.form == "cispo":
        loss, grad = clipped * logprobs, clipped
        clipped_low, clipped_high = ratio < low, ratio > high
    else:
        loss, negative, at_bound = torch.maximum(unclipped, clipped), advantages < 0, clipped > unclipped
        if objective.dual_clip is not None:
            cap = -advantages * objective.dual_clip
            dual = negative & (loss > cap)
            loss = torch.where(dual, cap, loss)
        grad = unclipped.masked_fill(at_bound | dual | (log_ratio.abs() > LOG_RATIO_LIMIT), 0.0)
        clipped_low, clipped_high = at_bound & negative, at_bound & ~negative

    if tokens.old_kl_coefs is not None:
        loss, grad = loss + tokens.old_kl_coefs * log_ratio.abs(), grad + tokens.old_kl_coefs * log_ratio.sign()
    if tokens.tis_weights is not None:
        loss, grad = loss * tokens.tis_weights, grad * tokens.tis_weights
    kl = torch.zeros_like(loss)
    if tokens.ref_logprobs is not None:
        kl, kl_grad = kl_terms(logprobs - tokens.ref_logprobs, objective.kl_estimator)
        loss, grad = loss + objective.kl_coef * kl, grad + objective.kl_coef * kl_grad
    return TokenTerms(loss, grad, ratio, clipped_low, clipped_high, dual, kl)


def kl_terms(log_ratio: Tensor, estimator: KLEstimator) -> tuple[Tensor, Tensor]:
    """Return each token's estimate of KL(π_θ‖π_ref), the KL to the reference policy in nats, and its derivative.

    `log_ratio` [T] is x = log π_θ - log π_ref of tokens sampled from π_θ. The estimators are
    k1 = x, k2 = x²/2, k3 = exp(-x) - 1 + x (http://joschu.net/blog/kl-approx.html).
    k3 is clamped to at most 10, with derivative 0 above that (x below -2.6 or above 11). Without the clamp, a token that
    π_θ holds for e^-20 times as likely as π_ref would have a derivative of 4.9e8. Values and derivatives equal
    kl_penalty of verl 0.9.1 (trainer/ppo/core_algos.py).
    The derivative is that of the estimator with respect to x. As a loss term, averaged over samples of π_θ, k2 has the
    gradient of KL(π_θ‖π_ref), k3 (not clamped) that of the opposite direction KL(π_ref‖π_θ), and k1 has gradient 0.
    The returned values are differentiable with respect to `log_ratio`.
    """
    if estimator == "k1":
        return log_ratio, torch.ones_like(log_ratio)
    if estimator == "k2":
        return log_ratio.square() / 2, log_ratio
    x = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)  # exp(-x) stays finite
    excess = torch.expm1(-x)
    value = excess + x
    return value.clamp(max=K3_LIMIT), -excess.masked_fill(value > K3_LIMIT, 0.0)


def token_losses(logprobs: Tensor, tokens: TokenInputs, objective: Objective) -> TokenTerms:
    """Return policy_loss_terms with `loss` and `grad_logprobs` multiplied by the token weights."""
    terms = policy_loss_terms(logprobs, tokens, objective)
    weights = tokens.token_weights
    return terms._replace(loss=weights * terms.loss, grad_logprobs=weights * terms.grad_logprobs)


def score(
    logits: Tensor, targets: Tensor, shard: VocabShard, temperature: float, *, keep_logits: bool = False
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies [n] of `logits` [n, V_local] / temperature, by the operations of `differentiate`.

    Overwrites `logits` unless `keep_logits`. Collective: one all-gather over shard.group if it has several ranks.
    """
    softmax = _softmax(logits.clone() if keep_logits else logits, targets, shard, temperature)
    return softmax.logprobs, softmax.entropy


def differentiate(
    logits: Tensor,
    targets: Tensor,
    tokens: TokenInputs,
    objective: Objective,
    shard: VocabShard,
    temperature: float,
    grad_dtype: torch.dtype | None,
    *,
    keep_logits: bool = False,
) -> tuple[PolicyHeadOutput, Tensor | None]:
    """Return the losses of a chunk's tokens, and the gradient of their sum to `logits`, both [n, V_local].

    targets      int64 [n], global token ids.
    grad_dtype   dtype of the gradient; None for no gradient.
    keep_logits  leaves `logits` unchanged; otherwise they are overwritten.
    Computes in fp32 (fp64 for fp64 logits). Collective: as in `score`.
    """
    softmax = _softmax(logits.clone() if keep_logits else logits, targets, shard, temperature)
    terms = policy_loss_terms(softmax.logprobs, tokens, objective)
    loss = tokens.token_weights * (terms.loss - objective.entropy_coef * softmax.entropy)
    losses = PolicyHeadOutput(loss, softmax.logprobs, softmax.entropy, *terms[2:])
    if grad_dtype is None:
        return losses, None
    scale = tokens.token_weights / temperature
    slope = objective.entropy_coef * scale if objective.entropy_coef else None
    return losses, logit_gradient(softmax, scale * terms.grad_logprobs, slope).to(grad_dtype)


def _softmax(logits: Tensor, targets: Tensor, shard: VocabShard, temperature: float) -> Softmax:
    logits = logits.to(compute_dtype(logits))
    if temperature != 1.0:
        logits.div_(temperature)
    return target_softmax(logits, targets, shard)
