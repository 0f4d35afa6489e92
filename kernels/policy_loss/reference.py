"""The DAPO objective of single tokens: its value and its derivative with respect to the log-prob, in closed form.

Change here: the per-token formula. In plain PyTorch it is written once, for the loss from log-probs, from logits and
from hidden states; its Triton twin is token_terms.py, and policy_head/reference.py defines the same by autograd.
`score`, `differentiate` and `token_losses` are what every implementation offers (dispatch.py).
Source: DAPO (arXiv 2503.14476) eq. 8, with separate clip ranges, and dual clip (arXiv 1912.09729) as an option.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .shard import VocabShard
from .softmax import Softmax, logit_gradient, target_softmax

KLEstimator = Literal["k1", "k2", "k3"]

# exp(20) is 4.9e8: far beyond every clip range, yet finite in each dtype, times any advantage.
LOG_RATIO_LIMIT = 20.0
K3_LIMIT = 10.0


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


class PolicyHeadOutput(NamedTuple):
    """The loss of a batch seen from its logits, and detached, [T] each, what happened to its tokens.

    loss      the differentiable scalar; inside an implementation [n], each token's part of it:
              token weight · (TokenTerms.loss - entropy_coef · entropy).
    logprobs  log-prob of the target in nats; `entropy` of the whole distribution, too.
    The other fields are those of TokenTerms.
    """

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
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
    """Return estimates of KL(policy ‖ reference) in nats and their derivatives, of `log_ratio` = logp - ref [T].

    k1 = x, k2 = x²/2, k3 = exp(-x) - 1 + x (http://joschu.net/blog/kl-approx.html), of tokens that the policy sampled.
    k3 is at most 10, with derivative 0 where it is cut (x below -2.6 or above 11): uncut, a token that the policy holds
    for e^-20 times as likely as the reference would pull with 4.9e8. All three are kl_penalty of verl 0.9.1
    (trainer/ppo/core_algos.py), value and derivative.
    The derivative is the estimator's own, so k1 in the loss pulls by a constant that knows nothing of the reference, and
    k3's is on average that of the reverse KL; only k2's is that of the KL. Values are differentiable in `log_ratio`.
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
    """The terms of policy_loss_terms with `loss` and `grad_logprobs` multiplied by the token weights."""
    terms = policy_loss_terms(logprobs, tokens, objective)
    weights = tokens.token_weights
    return terms._replace(loss=weights * terms.loss, grad_logprobs=weights * terms.grad_logprobs)


def score(logits: Tensor, targets: Tensor, shard: VocabShard, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [n] of `logits` [n, V_local] / temperature, by the operations of `differentiate`.

    Overwrites `logits`. Collective: one all-gather over shard.group, if that has several ranks.
    """
    softmax = _softmax(logits, targets, shard, temperature)
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
    """The losses of a chunk's tokens, and the gradient [n, V_local] of their sum to `logits` [n, V_local].

    targets      int64 [n], global ids.
    grad_dtype   of the gradient; None for no gradient.
    keep_logits  leaves `logits` as they are; else their memory is used up.
    Computed in fp32 (fp64 for fp64 logits). Collective: as in `score`.
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


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """fp64 for fp64, fp32 for anything narrower."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
