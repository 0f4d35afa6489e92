"""The policy head: from hidden states to log-probs, or straight to the DAPO loss with its gradients.

Change here: what is accepted, what a wrong argument is told, and which implementation runs. The mathematics is in
reference.py (plain PyTorch, any device) and the objective of a token in policy_loss/reference.py.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..policy_loss import Objective, make_token_inputs
from ..policy_loss.reference import KLEstimator
from . import reference
from .reference import PolicyHeadOutput, VocabShard

__all__ = ["PolicyHeadOutput", "linear_logprobs", "linear_policy_loss"]

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
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
    chunk_tokens: int = 1024,
) -> PolicyHeadOutput:
    """The loss Σ_t weight_t · (policy term + kl_coef · KL - entropy_coef · entropy), and what happened to each token.

    hidden         [T, H] in fp32, bf16 or fp64: only rows with a loss token; T may be 0.
    weight         [V_local, H], same dtype: rows rank·V_local … of the output matrix.
    targets        int64 [T], global token ids below vocab_size (checked on the CPU; on a GPU a bad one gets -inf).
    advantages, token_weights, old_logprobs, ref_logprobs, tis_weights
                   floating [T], constants. `token_weights` holds the normalisation (1/N and masks) and multiplies every
                   term; `tis_weights` multiplies only the policy term.
    old_logprobs   None means on-policy: old is this very log-prob, the ratio is exactly 1, and with advantages 1 the
                   gradient is that of weighted cross-entropy.
    temperature    divides the logits, as in sampling; log-probs, entropy and KL are those of the divided logits.
    vocab_size     true size of the vocabulary; columns from there on are padding: probability 0, gradient 0.
    chunk_tokens   rows projected at a time: workspace is a few [chunk_tokens, V_local] tensors in fp32 (fp64 for fp64).

    `loss` is differentiable with respect to hidden and weight; every other field is detached, [T] in fp32 (fp64).
    Gradients are made in this call, if grad mode is on and an input requires them, and held in the input's dtype until
    backward, which scales them. Repeatable bit by bit.
    Tensor parallelism: one all-gather of [4, n] statistics a chunk over `tp_group` (none for T = 0); its ranks must
    give the same rows. All results are the same on all ranks, except that **the gradient to hidden is this rank's
    partial sum over its vocabulary rows: the caller reduces it over tp_group** (or reduce-scatters it).
    Raises ValueError for shapes, dtypes or devices that do not fit, and for constants out of range.
    Source: DAPO (arXiv 2503.14476) eq. 8; details in policy_loss/reference.py.
    """
    shard = _check(hidden, weight, targets, temperature, vocab_size, tp_group, chunk_tokens)
    objective = Objective(clip_low, clip_high, dual_clip, kl_coef, kl_estimator, entropy_coef)
    like = reference.compute_like(hidden, len(hidden))
    tokens = make_token_inputs(like, objective, advantages, token_weights, old_logprobs, ref_logprobs, tis_weights)
    return reference.linear_policy_loss(hidden, weight, targets, tokens, objective, shard, temperature, chunk_tokens)


@torch.no_grad()
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    chunk_tokens: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Log-probs of `targets` and entropies in nats, [T] in fp32 (fp64 for fp64), without gradient.

    Arguments, collective and errors as in linear_policy_loss. On the same rows, with the same chunk_tokens, the
    log-probs are bitwise those of linear_policy_loss: scored and trained alike, the ratio is exactly 1.
    """
    shard = _check(hidden, weight, targets, temperature, vocab_size, tp_group, chunk_tokens)
    return reference.linear_logprobs(hidden, weight, targets, shard, temperature, chunk_tokens)


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    vocab_size: int | None,
    tp_group: dist.ProcessGroup | None,
    chunk_tokens: int,
) -> VocabShard:
    """This rank's part of the vocabulary, once every argument fits."""
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} must be above 0: it divides the logits")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens {chunk_tokens} must be at least 1")
    _check_matrices(hidden, weight)
    shard = _vocab_shard(len(weight), vocab_size, tp_group)
    _check_targets(targets, hidden, vocab_size or shard.num_ranks * len(weight))
    return shard


def _check_matrices(hidden: Tensor, weight: Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or len(weight) == 0:
        raise ValueError(
            f"hidden must be [T, H] and weight [V_local, H] with the same H and V_local at least 1, "
            f"got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if hidden.dtype != weight.dtype or hidden.dtype not in DTYPES:
        raise ValueError(
            f"hidden and weight must share one of float32, bfloat16, float64, got {hidden.dtype} and {weight.dtype}; "
            f"cast one (float16 cannot hold gradients of size 1/N)"
        )
    if hidden.device != weight.device:
        raise ValueError(f"hidden is on {hidden.device}, but weight on {weight.device}; move one")


def _vocab_shard(num_rows: int, vocab_size: int | None, tp_group: dist.ProcessGroup | None) -> VocabShard:
    rank, num_ranks = (0, 1) if tp_group is None else (dist.get_rank(tp_group), dist.get_world_size(tp_group))
    padded = num_ranks * num_rows
    if vocab_size is not None and not 1 <= vocab_size <= padded:
        raise ValueError(
            f"vocab_size {vocab_size} must be between 1 and the {padded} rows there are: "
            f"{num_rows} weight rows on each of {num_ranks} tensor-parallel ranks"
        )
    start = rank * num_rows
    num_real = min(max((vocab_size or padded) - start, 0), num_rows)
    return VocabShard(start, num_real, tp_group, num_ranks)


def _check_targets(targets: Tensor, hidden: Tensor, vocab_size: int) -> None:
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64 or targets.device != hidden.device:
        raise ValueError(
            f"targets must be int64 [{len(hidden)}] on {hidden.device}, one for each row of hidden, "
            f"got {targets.dtype} {list(targets.shape)} on {targets.device}"
        )
    # Looking at values would stall a GPU's stream; there a bad target shows as log-prob -inf.
    if targets.is_cpu and len(targets):
        low, high = (int(bound) for bound in targets.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"targets must lie in 0 … {vocab_size - 1}, the vocabulary, but span {low} … {high}")
