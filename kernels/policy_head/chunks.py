"""The policy head, chunk by chunk: project, compute loss and gradient, multiply back. There is never a [T, V] tensor.

Change here: how a chunk is projected, and where its gradients go. policy_loss/ computes the loss and gradient of a
chunk's logits, in PyTorch or in Triton; the vendor's library multiplies the matrices.
d loss / d logit needs only the log-prob, old log-prob, advantage and weight, all known in the forward pass. So a chunk
costs three matrix products (logits, gradient to hidden, gradient to weight), and nothing is computed twice.
Letters: T tokens, n tokens of a chunk, H hidden, V_local vocabulary rows of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from ..policy_loss import Objective, PolicyHeadOutput, TokenInputs
from ..policy_loss.autograd import with_gradients
from ..policy_loss.records import compute_dtype
from ..policy_loss.shard import VocabShard
from .main_grad import MainGradTarget, with_hidden_gradient
from .products import add_product, product, wide_operands

OwnWeights = Callable[[Tensor, slice], Tensor]
"""Returns the TIS weights [n] of some rows from their own log-probs [n]."""


@dataclass(frozen=True, slots=True)
class Projection:
    """How to compute the logits of a chunk. `implementation` (policy_loss/dispatch.py) computes their loss."""

    shard: VocabShard
    temperature: float
    chunk_tokens: int
    logits_dtype: torch.dtype | None
    implementation: ModuleType

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Return [n, V_local], before the division by the temperature."""
        return product(hidden, weight.t(), self.logits_dtype or compute_dtype(hidden))

    def score(self, logits: Tensor, targets: Tensor, *, keep_logits: bool = False) -> tuple[Tensor, Tensor]:
        """Return log-probs and entropies [n], bitwise those of the loss."""
        return self.implementation.score(logits, targets, self.shard, self.temperature, keep_logits=keep_logits)

    def chunks(self, num_tokens: int) -> Iterator[slice]:
        """Yield row ranges in order; one empty range for no tokens, so that results keep their shapes and dtypes."""
        for start in range(0, max(num_tokens, 1), self.chunk_tokens):
            yield slice(start, min(start + self.chunk_tokens, num_tokens))


def linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, projection: Projection) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies [T], by the operations of linear_policy_loss in the same order: bitwise equal."""
    hidden, weight = wide_operands(hidden.detach(), weight.detach())

    def score(rows: slice) -> tuple[Tensor, Tensor]:
        return projection.score(projection.logits(hidden[rows], weight), targets[rows])

    logprobs, entropy = zip(*map(score, projection.chunks(len(hidden))))
    return torch.cat(logprobs), torch.cat(entropy)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    tokens: TokenInputs,
    objective: Objective,
    projection: Projection,
    target: MainGradTarget | None,
    reduce_hidden_grad: bool,
    own_tis_weights: OwnWeights | None,
) -> PolicyHeadOutput:
    """Return the loss. Compute the gradients to hidden and weight now; the backward pass only scales them."""
    one_chunk = len(hidden) <= projection.chunk_tokens
    grads = _Gradients(hidden, weight, target, projection.shard if reduce_hidden_grad else None, one_chunk)

    def differentiate(rows: slice) -> PolicyHeadOutput:
        logits, chunk = projection.logits(x[rows], w), tokens.rows(rows)
        if own_tis_weights is not None:
            logprobs, _ = projection.score(logits, targets[rows], keep_logits=True)
            chunk = chunk._replace(tis_weights=own_tis_weights(logprobs, rows)).checked(logprobs, objective)
        losses, grad_logits = projection.implementation.differentiate(
            logits,
            targets[rows],
            chunk,
            objective,
            projection.shard,
            projection.temperature,
            w.dtype if grads else None,
        )
        if grad_logits is not None:
            grads.add(grad_logits, x[rows], w, rows)
        return losses

    with torch.no_grad():
        x, w = wide_operands(hidden, weight)
        losses = PolicyHeadOutput(*map(torch.cat, zip(*map(differentiate, projection.chunks(len(hidden))))))
        loss = losses.loss.sum()
    return losses._replace(loss=grads.attach(loss))


class _Gradients:
    """Gradients to hidden (in its dtype) and weight, if the inputs require them.

    The gradient to weight is kept until the backward pass, or added to `target` in the eager gradient mode. Several chunks
    are summed in the compute dtype; `one_chunk` is its own sum, in the dtype of weight. With `shard` the gradient to hidden is
    summed over its ranks.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: MainGradTarget | None,
        shard: VocabShard | None,
        one_chunk: bool,
    ) -> None:
        on = torch.is_grad_enabled()
        self.inputs, self.target, self.shard = (hidden, weight), target, shard
        self.hidden = torch.empty_like(hidden) if on and hidden.requires_grad else None
        self.weight: Tensor | None = None
        self.weight_dtype = None
        if target is None and on and weight.requires_grad:
            self.weight_dtype = weight.dtype if one_chunk else compute_dtype(weight)
        self.sums: list[dist.Work] = []

    def __bool__(self) -> bool:
        return self.hidden is not None or self.target is not None or self.weight_dtype is not None

    def add(self, grad_logits: Tensor, hidden: Tensor, weight: Tensor, rows: slice) -> None:
        """Add the gradients of a chunk whose gradient to the logits is `grad_logits` [n, V_local]."""
        if self.hidden is not None:
            self.hidden[rows] = torch.mm(grad_logits, weight)
            # Start the sum first: the product below overlaps it.
            if self.shard is not None and (started := self.shard.start_sum(self.hidden[rows])):
                self.sums.append(started)
        self._add_to_weight(grad_logits.t(), hidden)

    def _add_to_weight(self, grad_logits: Tensor, hidden: Tensor) -> None:
        """Add the product [V_local, n] @ [n, H]. The first one is the sum so far: nothing is filled with zeros."""
        if self.target is not None:
            add_product(self.target.main_grad, grad_logits, hidden, self.target.scale)
        elif self.weight is not None:
            add_product(self.weight, grad_logits, hidden)
        elif self.weight_dtype is not None:
            self.weight = product(grad_logits, hidden, self.weight_dtype)

    def attach(self, loss: Tensor) -> Tensor:
        """Return the loss on the graph of hidden and weight. Wait for the sums over ranks."""
        for started in self.sums:
            started.wait()
        if self.target is not None:
            return with_hidden_gradient(loss, *self.inputs, self.hidden, self.target)
        if not self:
            return loss
        weight = self.weight if self.weight is None else self.weight.to(self.inputs[1].dtype)
        return with_gradients(loss, self.inputs, (self.hidden, weight))
