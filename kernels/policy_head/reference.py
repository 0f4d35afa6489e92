"""The DAPO loss and its gradients from hidden states, chunk by chunk in plain PyTorch: never a [T, V] tensor.

Change here: how logits become log-probs, entropies and gradients. The objective of a token is policy_loss/reference.py.
Everything d loss / d logit needs (log-prob, old log-prob, advantage, weight) is known in the forward pass, so a chunk
costs three matrix products (logits, gradient to hidden, gradient to weight) and nothing is computed twice.
Letters: T tokens, n tokens of a chunk, H hidden, V_local vocabulary rows of this rank, R tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..policy_loss.reference import Objective, TokenInputs, TokenTerms, policy_loss_terms

# Stands for -inf in padded columns: exp gives 0 all the same, and 0 · x stays 0 where 0 · -inf would be nan.
PADDED_LOGIT = -1e30


class PolicyHeadOutput(NamedTuple):
    """The differentiable scalar loss and, detached, [T] each: see linear_policy_loss and TokenTerms."""

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    clipped_dual: Tensor
    kl: Tensor


@dataclass(frozen=True, slots=True)
class VocabShard:
    """Where this rank's vocabulary rows lie: ids start … start + num_real - 1; rows from num_real on are padding."""

    start: int
    num_real: int
    group: dist.ProcessGroup | None
    num_ranks: int


class Softmax(NamedTuple):
    """A chunk's softmax over the whole vocabulary. `max` is a row's largest logit over all ranks.

    shifted, exps   [n, V_local] logit - this rank's max, and its exp, except 0 in the target's column.
    offset          [n] this rank's max - max.
    column, owned   [n, 1] the target's column on this rank, and bool: whether it is here at all (else column is 0).
    target          [n] target logit - max.
    others, total   [n] Σ exp(logit - max) without and with the target.
    mean            [n] expectation of logit - max under the policy.
    """

    shifted: Tensor
    exps: Tensor
    offset: Tensor
    column: Tensor
    owned: Tensor
    target: Tensor
    others: Tensor
    total: Tensor
    mean: Tensor
    logprobs: Tensor
    entropy: Tensor


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabShard, temperature: float, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [T], by the operations of linear_policy_loss in the same order: bitwise the same."""
    hidden, weight = mixed_operands(hidden.detach(), weight.detach())
    logprobs, entropy = compute_like(hidden, len(hidden)), compute_like(hidden, len(hidden))
    for rows in _chunks(len(hidden), chunk_tokens):
        softmax = target_softmax(_logits(hidden[rows], weight, shard, temperature), targets[rows], shard)
        logprobs[rows], entropy[rows] = softmax.logprobs, softmax.entropy
    return logprobs, entropy


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    tokens: TokenInputs,
    objective: Objective,
    shard: VocabShard,
    temperature: float,
    chunk_tokens: int,
) -> PolicyHeadOutput:
    """The loss, with gradients to hidden and weight made now: the backward pass only scales them."""
    grads = _Gradients.for_inputs(hidden, weight)
    with torch.no_grad():
        x, w = mixed_operands(hidden, weight)
        parts = []
        for rows in _chunks(len(hidden), chunk_tokens):
            softmax = target_softmax(_logits(x[rows], w, shard, temperature), targets[rows], shard)
            chunk = tokens.rows(rows)
            terms = policy_loss_terms(softmax.logprobs, chunk, objective)
            parts.append((softmax.logprobs, softmax.entropy, *terms))
            if grads.wanted:
                scale = chunk.token_weights / temperature
                slope = objective.entropy_coef * scale if objective.entropy_coef else None
                grads.add(logit_gradient(softmax, scale * terms.grad_logprobs, slope), x, w, rows)
        logprobs, entropy, *columns = (torch.cat(part) for part in zip(*parts))
        terms = TokenTerms(*columns)
        loss = (tokens.token_weights * (terms.loss - objective.entropy_coef * entropy)).sum()
    if grads.wanted:
        loss = _GivenGradients.apply(hidden, weight, loss, grads.hidden, grads.weight)
    return PolicyHeadOutput(loss, logprobs, entropy, *terms[2:])


def target_softmax(logits: Tensor, targets: Tensor, shard: VocabShard) -> Softmax:
    """The softmax of a chunk's `logits` [n, V_local], which it overwrites, and log-probs of `targets` [n] (global ids).

    One all-gather of [4, n] statistics over `shard.group`, summed in rank order: every rank gets the same bits.
    The target is kept out of the sum of exponentials, so that 1 - p = others / total, and with it log p and its
    gradient, stays exact to rounding for confident tokens, where p itself rounds to 1.
    A target outside the vocabulary gets log-prob -inf.
    """
    column = (targets - shard.start)[:, None]
    owned = (column >= 0) & (column < shard.num_real)
    column = column.masked_fill(~owned, 0)
    target_logit = logits.gather(1, column).masked_fill(~owned, -torch.inf)[:, 0]
    rank_max = logits.amax(1)
    shifted = logits.sub_(rank_max[:, None])
    exps = shifted.exp()
    _write_target(exps, column, owned, torch.zeros_like(rank_max))

    statistics = torch.stack([rank_max, exps.sum(1), (exps * shifted).sum(1), target_logit])
    maxima, sums, weighted, target_logits = _all_gather(statistics, shard).unbind(1)  # [R, n] each
    top = maxima.amax(0)
    offsets = maxima - top
    scales = offsets.exp()
    others = (scales * sums).sum(0)
    target = target_logits.amax(0) - top  # one rank has it, the others say -inf
    target_exp = target.exp()
    total = others + target_exp
    mean = ((scales * (weighted + offsets * sums)).sum(0) + target_exp * target) / total
    # When the target is the largest logit, target is 0 and others may be below the rounding of 1.
    log_total = torch.where(target == 0, others.log1p(), total.log())
    entropy = log_total - mean
    return Softmax(
        shifted, exps, rank_max - top, column, owned, target, others, total, mean, target - log_total, entropy
    )


def logit_gradient(softmax: Softmax, grad_logprobs: Tensor, entropy_slope: Tensor | None) -> Tensor:
    """d loss / d logits [n, V_local], over softmax.exps, of loss = Σ grad_logprobs·logp - Σ entropy_slope·entropy.

    Target column: grad · (1 - p) = grad · others / total, where 1 - p would cancel; elsewhere: -grad · p.
    Entropy: d(-entropy) / d logit = p · (log p + entropy) = p · (logit - max - mean).
    """
    per_exp = -grad_logprobs / softmax.total
    at_target = grad_logprobs * softmax.others / softmax.total
    scale = softmax.offset.exp()
    if entropy_slope is None:
        gradient = softmax.exps.mul_((scale * per_exp)[:, None])
    else:
        slope = entropy_slope / softmax.total
        at_target += slope * softmax.target.exp() * (softmax.target - softmax.mean)
        inner = softmax.shifted + (softmax.offset - softmax.mean)[:, None]
        inner.mul_((scale * slope)[:, None]).add_((scale * per_exp)[:, None])
        gradient = softmax.exps.mul_(inner)
    _write_target(gradient, softmax.column, softmax.owned, at_target)
    return gradient


def mixed_operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Operands whose product can be had in the compute dtype: the CPU has no bf16 product with an fp32 result."""
    if hidden.dtype == torch.bfloat16 and not hidden.is_cuda:
        return hidden.float(), weight.float()
    return hidden, weight


def compute_like(tensor: Tensor, *shape: int) -> Tensor:
    """Uninitialised [shape] on the device of `tensor`, in fp64 for fp64 and in fp32 for anything narrower."""
    return tensor.new_empty(shape, dtype=_compute_dtype(tensor))


class _Gradients:
    """Gradients to hidden [T, H] and weight [V_local, H] in the compute dtype; None for an input that wants none."""

    def __init__(self, hidden: Tensor | None, weight: Tensor | None) -> None:
        self.hidden, self.weight = hidden, weight
        self.wanted = hidden is not None or weight is not None

    @classmethod
    def for_inputs(cls, hidden: Tensor, weight: Tensor) -> _Gradients:
        on = torch.is_grad_enabled()
        return cls(
            compute_like(hidden, *hidden.shape) if on and hidden.requires_grad else None,
            compute_like(weight, *weight.shape).zero_() if on and weight.requires_grad else None,
        )

    def add(self, grad_logits: Tensor, hidden: Tensor, weight: Tensor, rows: slice) -> None:
        grad_logits = grad_logits.to(weight.dtype)
        if self.hidden is not None:
            self.hidden[rows] = _product(grad_logits, weight)
        if self.weight is not None:
            self.weight += _product(grad_logits.t(), hidden[rows])


class _GivenGradients(torch.autograd.Function):
    """The loss, whose backward pass hands out ready gradients times the incoming one."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, loss: Tensor, *gradients: Tensor | None) -> Tensor:
        ctx.save_for_backward(*(g if g is None else g.to(hidden.dtype) for g in gradients))
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor):
        hidden, weight = (g if g is None else g * grad_loss for g in ctx.saved_tensors)
        return hidden, weight, None, None, None


def _chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """Row ranges in order; for no tokens one empty range, so that results keep their shapes and dtypes."""
    for start in range(0, max(num_tokens, 1), chunk_tokens):
        yield slice(start, min(start + chunk_tokens, num_tokens))


def _logits(hidden: Tensor, weight: Tensor, shard: VocabShard, temperature: float) -> Tensor:
    """Logits over temperature [n, V_local] in the compute dtype."""
    logits = _product(hidden, weight.t())
    if temperature != 1.0:
        logits.div_(temperature)
    if shard.num_real < len(weight):
        logits[:, shard.num_real :] = PADDED_LOGIT
    return logits


def _product(left: Tensor, right: Tensor) -> Tensor:
    dtype = _compute_dtype(left)
    return torch.mm(left, right) if left.dtype == dtype else torch.mm(left, right, out_dtype=dtype)


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _write_target(chunk: Tensor, column: Tensor, owned: Tensor, value: Tensor) -> None:
    """Sets the target's column of `chunk` [n, V_local] to `value` [n] in the rows whose target this rank holds."""
    chunk.scatter_(1, column, torch.where(owned, value[:, None], chunk.gather(1, column)))


def _all_gather(statistics: Tensor, shard: VocabShard) -> Tensor:
    """[R, 4, n]: the ranks' statistics in rank order. No collective for one rank or for no tokens."""
    if shard.num_ranks == 1 or statistics.numel() == 0:
        return statistics[None]
    gathered = statistics.new_empty(shard.num_ranks * len(statistics), statistics.shape[1])
    dist.all_gather_into_tensor(gathered, statistics, group=shard.group)
    return gathered.view(shard.num_ranks, *statistics.shape)
