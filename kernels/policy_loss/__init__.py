"""The DAPO loss from given log-probs or given logits, for models with a head of their own.

Change here: which arguments are accepted, and their errors. The formula is in torch_path.py, and again for the GPU in
token_terms.py.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .autograd import with_gradients
from .dispatch import Implementation, choose
from .records import Objective, PolicyHeadOutput, PolicyLossOutput, TokenInputs, TokenTerms, compute_dtype
from .shard import VocabShard, check_targets
from .torch_path import kl_terms, policy_loss_terms

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
    tokens: TokenInputs,
    objective: Objective,
    *,
    entropy: Tensor | None = None,
    implementation: Implementation = "auto",
) -> PolicyLossOutput:
    """Return the loss Σ_t weight_t · (policy term + kl_coef · KL - entropy_coef · entropy), and results per token.

    logprobs       fp32 or fp64 [T], natural log. The loss is differentiable with respect to it and to `entropy` [T].
    tokens         constants; converted to the dtype of `logprobs`.
    implementation "auto" takes Triton for fp32 on a GPU where it is installed, otherwise PyTorch.
    No collective. The formula and its sources: torch_path.policy_loss_terms.
    Raises ValueError if a shape, dtype or device does not fit.
    """
    if logprobs.dim() != 1 or logprobs.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"logprobs must be [T] in float32 or float64, got {list(logprobs.shape)} in {logprobs.dtype}; "
            f"narrower types lose the ratio of confident tokens"
        )
    like = logprobs.detach()
    tokens = tokens.checked(like, objective)
    if objective.entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef {objective.entropy_coef} needs `entropy` [{len(logprobs)}], which is None")
    losses = choose(implementation, like).token_losses(like, tokens, objective)
    loss = with_gradients(losses.loss.sum(), (logprobs,), (losses.grad_logprobs,))
    if objective.entropy_coef:
        loss = loss - objective.entropy_coef * (tokens.token_weights * entropy).sum()
    return PolicyLossOutput(loss, *losses[2:])


def policy_loss_from_logits(
    logits: Tensor,
    targets: Tensor,
    tokens: TokenInputs,
    objective: Objective,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    in_place: bool = False,
    implementation: Implementation = "auto",
) -> PolicyHeadOutput:
    """Return the loss of policy_loss, with log-probs and entropies computed from the caller's logits.

    logits         fp32, bf16 or fp64 [T, V_local]: this rank's columns, from rank·V_local on, before the division by
                   `temperature`. Computed in fp32 (fp64 for fp64).
    targets        int64 [T], global token ids below vocab_size. The CPU checks this; on a GPU a wrong id has log-prob -inf.
    tokens         constants; converted to fp32 (fp64 for fp64).
    vocab_size     size of the vocabulary without padding; columns from there on have probability 0 and gradient 0.
    in_place       writes the gradient into the memory of `logits`, whose values are lost. This saves a [T, V_local] tensor.
                   Nothing else may need the logits' values then (autograd raises an error if it does).
    implementation as in policy_loss, also for bf16.

    `loss` is differentiable with respect to logits; every other field is detached, [T] in fp32 (fp64).
    This call already computes the gradient if grad mode is on and logits requires one. Equal inputs give equal bits.
    Collective: one all-gather of [4, T] statistics over `tp_group` (none for T = 0). Gradients are this rank's columns.
    Raises ValueError if a shape, dtype or device does not fit.
    """
    if logits.dim() != 2 or logits.shape[1] == 0 or logits.stride(1) != 1 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be a floating [T, V_local] with V_local at least 1 and neighbouring columns next to each "
            f"other in memory, got {list(logits.shape)} in {logits.dtype} with strides {logits.stride()}"
        )
    check_temperature(temperature)
    shard = VocabShard.of(logits.shape[1], vocab_size, tp_group)
    check_targets(targets, len(logits), logits.device, vocab_size or shard.num_ranks * logits.shape[1])
    tokens = tokens.checked(logits.new_empty(len(logits), dtype=compute_dtype(logits)), objective)
    grad_dtype = logits.dtype if torch.is_grad_enabled() and logits.requires_grad else None
    losses, grad = choose(implementation, logits).differentiate(
        logits.detach(), targets, tokens, objective, shard, temperature, grad_dtype, keep_logits=not in_place
    )
    if in_place:
        torch.autograd.graph.increment_version(logits)
    loss = losses.loss.sum()
    if grad is not None:
        loss = with_gradients(loss, (logits,), (grad,))
    return losses._replace(loss=loss)


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless the temperature is above 0."""
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} must be above 0: it divides the logits")
