"""The policy head: from hidden states to log-probs, or straight to the DAPO loss with its gradients.

Change here: what is accepted, what a wrong argument is told, and which implementation runs. What is computed is
defined in reference.py; how, chunk by chunk, is in chunks.py, with the eager mode in eager.py. There is no kernel.py:
the head is the vendor's matrix products around what happens to logits, whose PyTorch and Triton are in policy_loss/.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..policy_loss import Objective, PolicyHeadOutput, check_temperature, make_token_inputs
from ..policy_loss.dispatch import Implementation, choose
from ..policy_loss.reference import KLEstimator, compute_dtype
from ..policy_loss.shard import VocabShard, check_targets
from . import chunks
from .eager import eager_target

__all__ = ["PolicyHeadOutput", "chunk_tokens_for", "linear_logprobs", "linear_policy_loss"]

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
    logits_dtype: torch.dtype | None = None,
    main_grad: Tensor | None = None,
    grad_scale: float = 1.0,
    reduce_hidden_grad: bool = False,
    implementation: Implementation = "auto",
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
    chunk_tokens   rows projected at a time. Workspace: with Triton one [chunk_tokens, V_local] in logits_dtype (see
                   chunk_tokens_for), in plain PyTorch a few in fp32 (fp64 for fp64).
    logits_dtype   None is fp32 (fp64 for fp64). bfloat16, for bf16 inputs, rounds the logits as a rollout engine may
                   do: log-probs move by 0.01 to 0.1.
    main_grad      eager mode: contiguous fp32 (fp64) [V_local, H], to which grad_scale · d loss / d weight is added *in
                   this call*; weight then receives a dummy gradient in backward, and weight.grad_added_to_main_grad is
                   set, as Megatron's DistributedDataParallel expects. Only where this call is followed by exactly one
                   backward pass: refused under no_grad and in the replay of a checkpoint.
    grad_scale     in eager mode, the gradient that the loss will receive; another one fails in backward.
    reduce_hidden_grad
                   the gradient to hidden is summed over tp_group in this call, hidden under the products that make the
                   gradient to weight; else the caller reduces it (or reduce-scatters it).
    implementation "auto" is Triton for fp32 and bf16 on a GPU where it is installed, else plain PyTorch. "triton" on
                   CPU tensors needs TRITON_INTERPRET=1: for tests.

    `loss` is differentiable with respect to hidden and weight; every other field is detached, [T] in fp32 (fp64).
    Gradients are made in this call, if grad mode is on and an input requires them, and held in the input's dtype until
    backward, which scales them. Repeatable bit by bit.
    Tensor parallelism: one all-gather of [4, n] statistics a chunk over `tp_group`, with reduce_hidden_grad also one
    all-reduce of [n, H] (none for T = 0); its ranks must give the same rows. All results are the same on all ranks,
    except that **without reduce_hidden_grad the gradient to hidden is this rank's partial sum over its vocabulary
    rows**.
    Raises ValueError for shapes, dtypes or devices that do not fit, and for constants out of range; RuntimeError where
    eager mode is refused.
    Source: DAPO (arXiv 2503.14476) eq. 8; details in policy_loss/reference.py.
    """
    how = _projection(
        hidden, weight, targets, temperature, vocab_size, tp_group, chunk_tokens, logits_dtype, implementation
    )
    objective = Objective(clip_low, clip_high, dual_clip, kl_coef, kl_estimator, entropy_coef)
    like = hidden.new_empty(len(hidden), dtype=compute_dtype(hidden))
    tokens = make_token_inputs(like, objective, advantages, token_weights, old_logprobs, ref_logprobs, tis_weights)
    eager = eager_target(weight, main_grad, grad_scale, compute_dtype(weight))
    return chunks.linear_policy_loss(hidden, weight, targets, tokens, objective, how, eager, reduce_hidden_grad)


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
    logits_dtype: torch.dtype | None = None,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-probs of `targets` and entropies in nats, [T] in fp32 (fp64 for fp64), without gradient.

    Arguments, collective and errors as in linear_policy_loss. On the same rows, with the same chunk_tokens, the
    log-probs are bitwise those of linear_policy_loss: scored and trained alike, the ratio is exactly 1.
    """
    how = _projection(
        hidden, weight, targets, temperature, vocab_size, tp_group, chunk_tokens, logits_dtype, implementation
    )
    return chunks.linear_logprobs(hidden, weight, targets, how)


def chunk_tokens_for(budget_bytes: int, vocab_local: int, logits_dtype: torch.dtype = torch.float32) -> int:
    """The most rows, a multiple of 128, whose logits [rows, vocab_local] fit into `budget_bytes`: at least 128.

    With Triton that is the whole workspace: the gradient takes the logits' memory. Larger chunks read and write the
    weight's fp32 gradient less often.
    """
    return max(budget_bytes // (vocab_local * logits_dtype.itemsize) // 128 * 128, 128)


def _projection(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    vocab_size: int | None,
    tp_group: dist.ProcessGroup | None,
    chunk_tokens: int,
    logits_dtype: torch.dtype | None,
    implementation: Implementation,
) -> chunks.Projection:
    """How to make and read the logits, once every argument fits."""
    check_temperature(temperature)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens {chunk_tokens} must be at least 1")
    _check_matrices(hidden, weight)
    if logits_dtype not in (None, compute_dtype(hidden), hidden.dtype):
        raise ValueError(
            f"logits_dtype {logits_dtype} must be None, {compute_dtype(hidden)} or that of hidden, {hidden.dtype}"
        )
    shard = VocabShard.of(len(weight), vocab_size, tp_group)
    check_targets(targets, len(hidden), hidden.device, vocab_size or shard.num_ranks * len(weight))
    return chunks.Projection(shard, temperature, chunk_tokens, logits_dtype, choose(implementation, hidden))


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
