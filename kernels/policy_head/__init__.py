"""The policy head: from hidden states to log-probs, or directly to the DAPO loss with its gradients.

Change here: which arguments are accepted, and their errors. reference.py defines the result, chunks.py computes it chunk
by chunk, main_grad.py is the eager gradient mode. There is no kernel.py: the head consists of the vendor library's
matrix products and of the pass over the logits, which policy_loss/ has in PyTorch and in Triton.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..policy_loss import Objective, PolicyHeadOutput, TokenInputs, check_temperature
from ..policy_loss.dispatch import Implementation, choose
from ..policy_loss.records import compute_dtype
from ..policy_loss.shard import VocabShard, check_targets
from . import chunks
from .main_grad import main_grad_target

__all__ = [
    "Objective",
    "PolicyHeadOutput",
    "TokenInputs",
    "chunk_tokens_for",
    "linear_logprobs",
    "linear_policy_loss",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    tokens: TokenInputs,
    objective: Objective,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    chunk_tokens: int = 1024,
    logits_dtype: torch.dtype | None = None,
    main_grad: Tensor | None = None,
    grad_scale: float = 1.0,
    reduce_hidden_grad: bool = False,
    own_tis_weights: chunks.OwnWeights | None = None,
    implementation: Implementation = "auto",
) -> PolicyHeadOutput:
    """Return the loss Σ_t weight_t · (policy term + kl_coef · KL - entropy_coef · entropy), and results per token.

    hidden         [T, H] in fp32, bf16 or fp64: only rows with a loss token; T may be 0.
    weight         [V_local, H], same dtype: this rank's rows of the output matrix, from rank·V_local on.
    targets        int64 [T], global token ids below vocab_size. The CPU checks this; on a GPU a wrong id has log-prob -inf.
    tokens         constants; converted to fp32 (fp64 for fp64).
    temperature    divides the logits, as in sampling; log-probs, entropy and KL are those of the divided logits.
    vocab_size     size of the vocabulary without padding; columns from there on have probability 0 and gradient 0.
    chunk_tokens   rows projected at a time. Workspace: with Triton one [chunk_tokens, V_local] in logits_dtype (see
                   chunk_tokens_for), in PyTorch a few in fp32 (fp64 for fp64).
    logits_dtype   None is fp32 (fp64 for fp64). bfloat16, for bf16 inputs, rounds the logits as a rollout engine may
                   do; log-probs then move by 0.01 to 0.1.
    main_grad      eager gradient mode: contiguous fp32 (fp64) [V_local, H]. *This call* adds grad_scale · d loss / d weight
                   to it. In the backward pass the weight receives a dummy gradient, and weight.grad_added_to_main_grad is
                   set, as Megatron's DistributedDataParallel expects. Exactly one backward pass must follow this call, so
                   it is refused under no_grad and in the replay of an activation checkpoint.
    grad_scale     eager gradient mode: the gradient that the loss will receive. Any other one fails in the backward pass.
    reduce_hidden_grad
                   this call sums the gradient to hidden over tp_group while the gradient to weight is computed.
                   Otherwise the caller must reduce (or reduce-scatter) it.
    own_tis_weights
                   returns the TIS weights [n] of a chunk from this call's own log-probs [n] of its rows (a slice of T), where
                   no earlier pass has given any. It takes the place of tokens.tis_weights and costs one more read of each
                   chunk's logits and, under tensor parallelism, one more all-gather; no matrix product.
    implementation "auto" takes Triton for fp32 and bf16 on a GPU where it is installed, otherwise PyTorch. "triton" on
                   CPU tensors needs TRITON_INTERPRET=1, for tests.

    `loss` is differentiable with respect to hidden and weight; every other field is detached, [T] in fp32 (fp64).
    This call already computes the gradients if grad mode is on and an input requires them. They are kept in the input's
    dtype, and the backward pass scales them, in place unless it retains the graph. Equal inputs give equal bits.
    Without main_grad, several chunks sum the gradient to weight in fp32 [V_local, H] beside the workspace: for bf16 twice its
    final size, until this call returns. Rounded sums would lose what later chunks add.
    Tensor parallelism: one all-gather of [4, n] statistics per chunk over `tp_group`, and with reduce_hidden_grad one
    all-reduce of [n, H] per chunk (none for T = 0). Its ranks must pass the same rows. All results are equal on all ranks,
    except that **without reduce_hidden_grad the gradient to hidden is this rank's partial sum over its vocabulary
    rows**.
    Raises ValueError if a shape, dtype or device does not fit, RuntimeError if the eager gradient mode is refused.
    Source: DAPO (arXiv 2503.14476) eq. 8; details in policy_loss/torch_path.py.
    """
    projection = _projection(
        hidden, weight, targets, temperature, vocab_size, tp_group, chunk_tokens, logits_dtype, implementation
    )
    tokens = tokens.checked(hidden.new_empty(len(hidden), dtype=compute_dtype(hidden)), objective)
    target = main_grad_target(weight, main_grad, grad_scale, compute_dtype(weight))
    return chunks.linear_policy_loss(
        hidden, weight, targets, tokens, objective, projection, target, reduce_hidden_grad, own_tis_weights
    )


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
    """Return log-probs of `targets` and entropies in nats, [T] in fp32 (fp64 for fp64), without gradient.

    Arguments, collective and errors are those of linear_policy_loss. For the same rows and chunk_tokens the log-probs
    equal those of linear_policy_loss bitwise, so the ratio of the first gradient step is exactly 1.
    """
    projection = _projection(
        hidden, weight, targets, temperature, vocab_size, tp_group, chunk_tokens, logits_dtype, implementation
    )
    return chunks.linear_logprobs(hidden, weight, targets, projection)


def chunk_tokens_for(budget_bytes: int, vocab_local: int, logits_dtype: torch.dtype = torch.float32) -> int:
    """Return the most rows whose logits [rows, vocab_local] fit into `budget_bytes`: a multiple of 128, at least 128.

    With Triton that is the whole workspace, because the gradient overwrites the logits. Larger chunks read and write the
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
    """Check the arguments and return how to compute the logits."""
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
