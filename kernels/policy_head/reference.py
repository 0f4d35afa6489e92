"""The definition of the policy head: the whole [T, V] logits, the formulas of the papers, and autograd.

Change here: the definition. Training never uses it. Tests and the benchmark compare every other path with it in fp64;
it shares no formula with policy_loss/, so that it can check those closed forms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..policy_loss import Objective, PolicyHeadOutput, TokenInputs


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    tokens: TokenInputs,
    objective: Objective,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> PolicyHeadOutput:
    """Return the output of the package's linear_policy_loss, on one rank, in the dtype of `hidden` and `weight`.

    hidden [T, H], weight [V, H]. `loss` is differentiable with respect to both by autograd. Memory: several [T, V] tensors.
    Sources: DAPO (arXiv 2503.14476) eq. 8; dual clip (arXiv 1912.09729); CISPO (arXiv 2506.13585) eq. 4;
    http://joschu.net/blog/kl-approx.html.
    """
    distribution = (hidden @ weight[:vocab_size].t() / temperature).log_softmax(-1)  # [T, V]
    logprobs = distribution.gather(1, targets[:, None])[:, 0]
    entropy = -(distribution.exp() * distribution).sum(-1)
    return loss_of_tokens(logprobs, entropy, tokens, objective)


def loss_of_tokens(logprobs: Tensor, entropy: Tensor, tokens: TokenInputs, objective: Objective) -> PolicyHeadOutput:
    """Return the output for given `logprobs` and `entropy` [T], in their dtype; `loss` is differentiable to both."""
    advantages, low, high = tokens.advantages, 1 - objective.clip_low, 1 + objective.clip_high
    old = logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs
    ratio = (logprobs - old).clamp(-20, 20).exp()
    clipped_low, clipped_high = (advantages < 0) & (ratio < low), (advantages > 0) & (ratio > high)
    if objective.form == "cispo":
        loss = -ratio.detach().clamp(low, high) * advantages * logprobs
        clipped_low, clipped_high = ratio < low, ratio > high
    else:
        loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high))
    dual = torch.zeros_like(ratio, dtype=torch.bool)
    if objective.dual_clip is not None:
        cap = -advantages * objective.dual_clip
        dual = (advantages < 0) & (loss > cap)
        loss = torch.where(dual, cap, loss)
    if tokens.old_kl_coefs is not None:
        loss = loss + tokens.old_kl_coefs * (logprobs - old).abs()
    if tokens.tis_weights is not None:
        loss = loss * tokens.tis_weights
    kl = torch.zeros_like(ratio)
    if tokens.ref_logprobs is not None:
        kl = _kl(logprobs - tokens.ref_logprobs, objective.kl_estimator)
    total = (tokens.token_weights * (loss + objective.kl_coef * kl - objective.entropy_coef * entropy)).sum()

    fields = (logprobs, entropy, ratio, clipped_low, clipped_high, dual, kl)
    return PolicyHeadOutput(total, *(field.detach() for field in fields))


def _kl(x: Tensor, estimator: str) -> Tensor:
    """Return estimates of KL(π_θ‖π_ref) per token from x = log π_θ - log π_ref; k3 is at most 10, as in verl."""
    bounded = x.clamp(-20, 20)
    return {"k1": x, "k2": x**2 / 2, "k3": ((-bounded).exp() - 1 + bounded).clamp(max=10)}[estimator]
