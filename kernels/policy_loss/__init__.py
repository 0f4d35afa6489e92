"""The DAPO loss from given log-probs, for users with a head of their own.

Change here: what is accepted and what a wrong argument is told. The formula is in reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import KLEstimator, Objective, PolicyLossOutput, TokenInputs, TokenTerms, policy_loss_terms
from .reference import policy_loss as _reference

__all__ = ["Objective", "PolicyLossOutput", "TokenInputs", "TokenTerms", "policy_loss", "policy_loss_terms"]


def policy_loss(
    logprobs: Tensor,
    *,
    advantages: Tensor,
    token_weights: Tensor,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    tis_weights: Tensor | None = None,
    entropy: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    entropy_coef: float = 0.0,
) -> PolicyLossOutput:
    """The loss Σ_t weight_t · (policy term + kl_coef · KL - entropy_coef · entropy), and what happened to each token.

    logprobs       fp32 or fp64 [T], natural log; the loss is differentiable with respect to it and to `entropy` [T].
    advantages, token_weights, old_logprobs, ref_logprobs, tis_weights
                   floating [T], constants; converted to the dtype of `logprobs`. `token_weights` holds the
                   normalisation (1/N and masks) and multiplies every term; `tis_weights` only the policy term.
    old_logprobs   None means on-policy: the ratio is exactly 1, and with advantages 1 the gradient is supervised.
    No collective. The formula and its sources: reference.policy_loss_terms.
    Raises ValueError for shapes, dtypes or devices that do not fit, and for constants out of range.
    """
    if logprobs.dim() != 1 or logprobs.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"logprobs must be [T] in float32 or float64, got {list(logprobs.shape)} in {logprobs.dtype}; "
            f"narrower types lose the ratio of confident tokens"
        )
    objective = Objective(clip_low, clip_high, dual_clip, kl_coef, kl_estimator, entropy_coef)
    like = logprobs.detach()
    tokens = make_token_inputs(like, objective, advantages, token_weights, old_logprobs, ref_logprobs, tis_weights)
    if entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef {entropy_coef} needs `entropy` [{len(logprobs)}], which is None")
    return _reference(logprobs, entropy if entropy_coef else None, tokens, objective)


def make_token_inputs(
    like: Tensor,
    objective: Objective,
    advantages: Tensor,
    token_weights: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    tis_weights: Tensor | None,
) -> TokenInputs:
    """The tokens' constants, checked and converted to the shape [T], device and dtype of `like`, detached."""
    if objective.kl_coef and ref_logprobs is None:
        raise ValueError(f"kl_coef {objective.kl_coef} needs ref_logprobs [{len(like)}], which is None")
    given = TokenInputs(advantages, token_weights, old_logprobs, ref_logprobs, tis_weights)
    return TokenInputs(*(_convert(name, tensor, like) for name, tensor in given._asdict().items()))


def _convert(name: str, tensor: Tensor | None, like: Tensor) -> Tensor | None:
    if tensor is None:
        return None
    if tensor.shape != like.shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, but there are {len(like)} tokens: give [{len(like)}]")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}; give a floating type, float32 for preference")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, but the tokens are on {like.device}; move it there")
    return tensor.detach().to(like.dtype)
