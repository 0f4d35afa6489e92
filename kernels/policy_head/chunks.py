"""The policy head chunk by chunk: project, take the loss and its gradient, multiply back. Never a [T, V] tensor.

Change here: how a chunk is projected and where its gradients go. What happens to a chunk's logits is policy_loss, in
plain PyTorch or in Triton; the matrix products are the vendor's library's.
Everything d loss / d logit needs (log-prob, old log-prob, advantage, weight) is known in the forward pass, so a chunk
costs three matrix products (logits, gradient to hidden, gradient to weight) and nothing is computed twice.
Letters: T tokens, n tokens of a chunk, H hidden, V_local vocabulary rows of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from ..policy_loss import Objective, PolicyHeadOutput, TokenInputs
from ..policy_loss.autograd import with_gradients
from ..policy_loss.reference import compute_dtype
from ..policy_loss.shard import VocabShard
from .eager import EagerTarget, with_hidden_gradient
from .products import add_product, product, wide_operands


@dataclass(frozen=True, slots=True)
class Projection:
    """How a chunk's logits are made and read: by `implementation`, as policy_loss/dispatch.py chooses it."""

    shard: VocabShard
    temperature: float
    chunk_tokens: int
    logits_dtype: torch.dtype | None
    implementation: ModuleType

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """[n, V_local], before the division by the temperature."""
        return product(hidden, weight.t(), self.logits_dtype or compute_dtype(hidden))

    def chunks(self, num_tokens: int) -> Iterator[slice]:
        """Row ranges in order; for no tokens one empty range, so that results keep their shapes and dtypes."""
        for start in range(0, max(num_tokens, 1), self.chunk_tokens):
            yield slice(start, min(start + self.chunk_tokens, num_tokens))


def linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, how: Projection) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [T], by the operations of linear_policy_loss in the same order: bitwise the same."""
    hidden, weight = wide_operands(hidden.detach(), weight.detach())

    def score(rows: slice) -> tuple[Tensor, Tensor]:
        logits = how.logits(hidden[rows], weight)
        return how.implementation.score(logits, targets[rows], how.shard, how.temperature)

    logprobs, entropy = zip(*map(score, how.chunks(len(hidden))))
    return torch.cat(logprobs), torch.cat(entropy)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    tokens: TokenInputs,
    objective: Objective,
    how: Projection,
    eager: EagerTarget | None,
    reduce_hidden_grad: bool,
) -> PolicyHeadOutput:
    """The loss, with gradients to hidden and weight made now: the backward pass only scales them."""
    grads = _Gradients(hidden, weight, eager, how.shard if reduce_hidden_grad else None)

    def differentiate(rows: slice) -> PolicyHeadOutput:
        logits = how.logits(x[rows], w)
        losses, grad_logits = how.implementation.differentiate(
            logits, targets[rows], tokens.rows(rows), objective, how.shard, how.temperature, w.dtype if grads else None
        )
        if grad_logits is not None:
            grads.add(grad_logits, x[rows], w, rows)
        return losses

    with torch.no_grad():
        x, w = wide_operands(hidden, weight)
        losses = PolicyHeadOutput(*map(torch.cat, zip(*map(differentiate, how.chunks(len(hidden))))))
        loss = losses.loss.sum()
    return losses._replace(loss=grads.attach(loss))


class _Gradients:
    """Gradients to hidden, in its dtype, and weight, in the compute dtype, where they are wanted.

    That to weight is kept until the backward pass, or in eager mode added to where the caller says. With `shard` that
    to hidden is summed over its ranks.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, eager: EagerTarget | None, shard: VocabShard | None) -> None:
        on = torch.is_grad_enabled()
        self.inputs, self.eager, self.shard = (hidden, weight), eager, shard
        self.hidden = torch.empty_like(hidden) if on and hidden.requires_grad else None
        self.weight, self.factor = None, 1.0
        if eager is not None:
            self.weight, self.factor = eager.main_grad, eager.scale
        elif on and weight.requires_grad:
            self.weight = torch.zeros_like(weight, dtype=compute_dtype(weight))
        self.sums: list[dist.Work] = []

    def __bool__(self) -> bool:
        return self.hidden is not None or self.weight is not None

    def add(self, grad_logits: Tensor, hidden: Tensor, weight: Tensor, rows: slice) -> None:
        if self.hidden is not None:
            self.hidden[rows] = torch.mm(grad_logits, weight)
            # before the product with hidden, which hides it
            if self.shard is not None and (started := self.shard.start_sum(self.hidden[rows])):
                self.sums.append(started)
        if self.weight is not None:
            add_product(self.weight, grad_logits.t(), hidden, self.factor)

    def attach(self, loss: Tensor) -> Tensor:
        """The loss on the graph of hidden and weight."""
        for started in self.sums:
            started.wait()
        if self.eager is not None:
            return with_hidden_gradient(loss, *self.inputs, self.hidden, self.eager)
        if not self:
            return loss
        weight = self.weight if self.weight is None else self.weight.to(self.inputs[1].dtype)
        return with_gradients(loss, self.inputs, (self.hidden, weight))
