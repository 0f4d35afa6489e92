"""The DAPO objective of single tokens: its value and its derivative with respect to the log-prob, in closed form.

Change here: the per-token formula. It is written once; the policy head and the loss from given log-probs both use it.
Source: DAPO (arXiv 2503.14476) eq. 8, with separate clip ranges, and dual clip (arXiv 1912.09729) as an option.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

KLEstimator = Literal["k1", "k2", "k3"]

# exp(20) is 4.9e8: far beyond every clip range, yet finite in each dtype, times any advantage.
LOG_RATIO_LIMIT = 20.0


@dataclass(frozen=True, slots=True)
class Objective:
    """The constants of the objective.

    clip_low, clip_high  the ratio is clipped to [1 - clip_low, 1 + clip_high].
    dual_clip            c > 1: where the advantage is negative the loss is at most -A·c. None: no such bound.
    kl_coef              weight of the KL to the reference policy; `kl_estimator` says how a token estimates it.
    entropy_coef         weight of the entropy bonus (subtracted from the loss).
    Raises ValueError for values outside these ranges.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low < 1 or self.clip_high < 0:
            raise ValueError(
                f"clip_low {self.clip_low} must be in [0, 1) and clip_high {self.clip_high} at least 0: "
                f"the ratio is clipped to [1 - clip_low, 1 + clip_high]"
            )
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip {self.dual_clip} must be above 1 (10 is common); None switches it off")
        if self.kl_estimator not in ("k1", "k2", "k3"):
            raise ValueError(f"kl_estimator {self.kl_estimator!r} is unknown; use 'k1', 'k2' or 'k3'")


class TokenInputs(NamedTuple):
    """What is known of each token beside its log-prob; every tensor [T], None where the objective needs none."""

    advantages: Tensor
    token_weights: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    tis_weights: Tensor | None = None

    def rows(self, rows: slice) -> TokenInputs:
        """The same for some of the tokens."""
        return TokenInputs(*(tensor if tensor is None else tensor[rows] for tensor in self))


class TokenTerms(NamedTuple):
    """The objective of each token, before token weights and entropy bonus; every tensor [T].

    loss           policy term (times the TIS weight) + kl_coef · kl.
    grad_logprobs  d loss / d logprobs.
    ratio          exp(logprobs - old_logprobs), with the difference clamped to ±20.
    clipped_low    bool: A < 0 and ratio < 1 - clip_low, so the policy term has no gradient.
    clipped_high   bool: A > 0 and ratio > 1 + clip_high, likewise.
    clipped_dual   bool: A < 0 and ratio > dual_clip, likewise.
    kl             the estimate of KL(policy ‖ reference) in nats; 0 without reference log-probs.
    """

    loss: Tensor
    grad_logprobs: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    clipped_dual: Tensor
    kl: Tensor


class PolicyLossOutput(NamedTuple):
    """The differentiable scalar loss, and the fields of TokenTerms, detached."""

    loss: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    clipped_dual: Tensor
    kl: Tensor


def policy_loss_terms(logprobs: Tensor, tokens: TokenInputs, objective: Objective) -> TokenTerms:
    """The objective of each token and its derivative with respect to `logprobs` [T], all in the dtype of `logprobs`.

    Policy term: max(-A·r, -A·clip(r)), r = exp(clamp(logp - old, ±20)), times the token's TIS weight; its derivative is
    -A·r on the branch with r, 0 on a constant branch and outside the ±20 clamp. On a boundary, where both branches are
    equal, the token counts as not clipped and keeps the derivative -A·r (the one-sided derivatives differ there, and
    any value between them is a subgradient; ours says that r within *closed* clip bounds learns).
    `tokens.old_logprobs` None means on-policy: old is logp itself, detached, so r is exactly 1 and the derivative -A.
    """
    advantages = tokens.advantages
    old = logprobs if tokens.old_logprobs is None else tokens.old_logprobs
    log_ratio = logprobs - old
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    loss = torch.maximum(unclipped, clipped)

    negative = advantages < 0
    at_bound = clipped > unclipped
    dual = torch.zeros_like(negative)
    if objective.dual_clip is not None:
        cap = -advantages * objective.dual_clip
        dual = negative & (loss > cap)
        loss = torch.where(dual, cap, loss)
    constant = at_bound | dual | (log_ratio.abs() > LOG_RATIO_LIMIT)
    grad = unclipped.masked_fill(constant, 0.0)

    if tokens.tis_weights is not None:
        loss, grad = loss * tokens.tis_weights, grad * tokens.tis_weights
    kl = torch.zeros_like(loss)
    if tokens.ref_logprobs is not None:
        kl, kl_grad = kl_terms(logprobs - tokens.ref_logprobs, objective.kl_estimator)
        loss, grad = loss + objective.kl_coef * kl, grad + objective.kl_coef * kl_grad
    return TokenTerms(loss, grad, ratio, at_bound & negative, at_bound & ~negative, dual, kl)


def kl_terms(log_ratio: Tensor, estimator: KLEstimator) -> tuple[Tensor, Tensor]:
    """The estimate of KL(policy ‖ reference) and its derivative, of `log_ratio` = logp - ref [T].

    k1 = x, k2 = x²/2, k3 = exp(-x) - 1 + x (http://joschu.net/blog/kl-approx.html). k3 clamps x to ±20, with derivative
    0 outside, like the ratio. The derivative is the estimator's own, so k1 in the loss pulls by a constant that knows
    nothing of the reference; the expected derivative of k2 is that of the reverse KL.
    """
    if estimator == "k1":
        return log_ratio, torch.ones_like(log_ratio)
    if estimator == "k2":
        return log_ratio.square() / 2, log_ratio
    x = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    excess = torch.expm1(-x)
    return excess + x, -excess.masked_fill(log_ratio.abs() > LOG_RATIO_LIMIT, 0.0)


def policy_loss(
    logprobs: Tensor, entropy: Tensor | None, tokens: TokenInputs, objective: Objective
) -> PolicyLossOutput:
    """The weighted sum of the tokens' objectives, differentiable with respect to `logprobs` and `entropy` [T]."""
    terms = policy_loss_terms(logprobs.detach(), tokens, objective)
    loss = _WeightedSum.apply(logprobs, terms.loss, terms.grad_logprobs, tokens.token_weights)
    if entropy is not None:
        loss = loss - objective.entropy_coef * (tokens.token_weights * entropy).sum()
    return PolicyLossOutput(loss, *terms[2:])


class _WeightedSum(torch.autograd.Function):
    """Σ weight · loss, with the closed-form derivative in place of a traced one."""

    @staticmethod
    def forward(ctx, logprobs: Tensor, loss: Tensor, grad_logprobs: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(weights * grad_logprobs)
        return (weights * loss).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor):
        (grad_logprobs,) = ctx.saved_tensors
        return grad_loss * grad_logprobs, None, None, None
