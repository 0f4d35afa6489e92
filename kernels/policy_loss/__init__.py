"""The DAPO loss from given log-probs, or from given logits, for users with a head of their own.

Change here: what is accepted and what a wrong argument is told. The formula is in reference.py, and again, for the GPU,
in kernel.py.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .autograd import with_gradients
from .dispatch import Implementation, choose
from .reference import (
    KLEstimator,
    Objective,
    PolicyHeadOutput,
    PolicyLossOutput,
    TokenInputs,
    TokenTerms,
    compute_dtype,
    kl_terms,
    policy_loss_terms,
)
from .shard import VocabShard, check_targets

__all__ = [
    "Objective",
    "PolicyHeadOutput",
    "PolicyLossOutput",
    "TokenInputs",
    "TokenTerms",
    "kl_terms",
    "policy_loss",
    "policy_loss_from_logits",
    "policy_loss_terms",
]


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
    implementation: Implementation = "auto",
) -> PolicyLossOutput:
    """The loss Σ_t weight_t · (policy term + kl_coef · KL - entropy_coef · entropy), and what happened to each token.

    logprobs       fp32 or fp64 [T], natural log; the loss is differentiable with respect to it and to `entropy` [T].
    advantages, token_weights, old_logprobs, ref_logprobs, tis_weights
                   floating [T], constants; converted to the dtype of `logprobs`. `token_weights` holds the
                   normalisation (1/N and masks) and multiplies every term; `tis_weights` only the policy term.
    old_logprobs   None means on-policy: the ratio is exactly 1, and with advantages 1 the gradient is supervised.
    implementation "auto" is Triton for fp32 on a GPU where it is installed, else plain PyTorch.
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
    losses = choose(implementation, like).token_losses(like, tokens, objective)
    loss = with_gradients(losses.loss.sum(), (logprobs,), (losses.grad_logprobs,))
    if entropy_coef:
        loss = loss - entropy_coef * (tokens.token_weights * entropy).sum()
    return PolicyLossOutput(loss, *losses[2:])


def policy_loss_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    advantages: Tensor,
    token_weights: Tensor,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    tis_weights: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    entropy_coef: float = 0.0,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    in_place: bool = False,
    implementation: Implementation = "auto",
) -> PolicyHeadOutput:
    """The loss of policy_loss, with log-probs and entropies from logits that the caller has made.

    logits         fp32, bf16 or fp64 [T, V_local]: this rank's columns rank·V_local … of the logits, before the
                   division by `temperature`. Computed in fp32 (fp64 for fp64).
    targets        int64 [T], global token ids below vocab_size (checked on the CPU; on a GPU a bad one gets -inf).
    vocab_size     true size of the vocabulary; columns from there on are padding: probability 0, gradient 0.
    in_place       the gradient takes the memory of `logits`, whose values are lost: saves a [T, V_local] tensor, twice.
                   Then only one backward pass is possible, and nothing else may need the logits' values (autograd
                   refuses if it does).
    The other arguments are those of policy_loss.

    `loss` is differentiable with respect to logits; every other field is detached, [T] in fp32 (fp64).
    The gradient is made in this call, if grad mode is on and logits requires one. Repeatable bit by bit.
    Collective: one all-gather of [4, T] statistics over `tp_group` (none for T = 0). Gradients are this rank's columns.
    Raises ValueError for shapes, dtypes or devices that do not fit, and for constants out of range.
    """
    if logits.dim() != 2 or logits.shape[1] == 0 or logits.stride(1) != 1 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be a floating [T, V_local] with V_local at least 1 and neighbouring columns next to each "
            f"other in memory, got {list(logits.shape)} in {logits.dtype} with strides {logits.stride()}"
        )
    check_temperature(temperature)
    shard = VocabShard.of(logits.shape[1], vocab_size, tp_group)
    check_targets(targets, len(logits), logits.device, vocab_size or shard.num_ranks * logits.shape[1])
    objective = Objective(clip_low, clip_high, dual_clip, kl_coef, kl_estimator, entropy_coef)
    like = logits.new_empty(len(logits), dtype=compute_dtype(logits))
    tokens = make_token_inputs(like, objective, advantages, token_weights, old_logprobs, ref_logprobs, tis_weights)
    wanted = logits.dtype if torch.is_grad_enabled() and logits.requires_grad else None
    losses, grad = choose(implementation, logits).differentiate(
        logits.detach(), targets, tokens, objective, shard, temperature, wanted, keep_logits=not in_place
    )
    if in_place:
        torch.autograd.graph.increment_version(logits)
    loss = losses.loss.sum()
    if grad is not None:
        loss = with_gradients(loss, (logits,), (grad,), reuse=in_place)
    return losses._replace(loss=loss)


def check_temperature(temperature: float) -> None:
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} must be above 0: it divides the logits")


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
