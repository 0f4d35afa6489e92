"""A vocabulary-parallel softmax and its gradient in PyTorch, exact for confident tokens.

Change here: how log-probs, entropies and gradients follow from logits; row_softmax.py repeats it in Triton.
Letters: n tokens, V_local columns of this rank, R tensor-parallel ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .shard import VocabShard

# Replaces -inf in padded columns: exp still gives 0, but 0 · x is 0 where 0 · -inf would be nan.
PADDED_LOGIT = -1e30


class Softmax(NamedTuple):
    """Softmax of a chunk over the whole vocabulary. `max` is a row's largest logit over all ranks.

    shifted, exps   [n, V_local] logit - this rank's max, and its exp; exp is 0 in the target's column.
    offset          [n] this rank's max - max.
    column, owned   [n, 1] the target's column on this rank (0 if another rank has it), and bool: this rank has it.
    target          [n] target logit - max.
    others, total   [n] Σ exp(logit - max) without and with the target.
    mean            [n] expectation of logit - max under the policy.
    logprobs, entropy  [n] in nats.
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


def target_softmax(logits: Tensor, targets: Tensor, shard: VocabShard) -> Softmax:
    """Return the softmax of a chunk's `logits` [n, V_local] and the log-probs of `targets` [n] (global ids).

    Overwrites `logits`. Collective: one all-gather of [4, n] statistics over `shard.group`, summed in rank order, so all
    ranks get the same bits. The sum of exponentials leaves the target out. So 1 - p = others / total, log p and its
    gradient stay exact to rounding for confident tokens, whose p rounds to 1.
    The log-prob of a target outside the vocabulary is -inf.
    """
    column = (targets - shard.start)[:, None]
    owned = (column >= 0) & (column < shard.num_real)
    column = column.masked_fill(~owned, 0)
    target_logit = logits.gather(1, column).masked_fill(~owned, -torch.inf)[:, 0]
    logits[:, shard.num_real :] = PADDED_LOGIT
    rank_max = logits.clamp_(min=PADDED_LOGIT).amax(1)
    shifted = logits.sub_(rank_max[:, None])
    exps = shifted.exp()
    _write_target(exps, column, owned, torch.zeros_like(rank_max))

    statistics = torch.stack([rank_max, exps.sum(1), (exps * shifted).sum(1), target_logit])
    maxima, sums, weighted, target_logits = shard.all_gather(statistics).unbind(1)  # [R, n] each
    top = maxima.amax(0)
    offsets = maxima - top
    scales = offsets.exp()
    others = (scales * sums).sum(0)
    target = target_logits.amax(0) - top  # -inf on every rank but one
    target_exp = target.exp()
    total = others + target_exp
    mean = ((scales * (weighted + offsets * sums)).sum(0) + target_exp * target.clamp(min=PADDED_LOGIT)) / total
    # When the target is the largest logit, target is 0 and others may be below the rounding of 1.
    log_total = torch.where(target == 0, others.log1p(), total.log())
    entropy = log_total - mean
    return Softmax(
        shifted, exps, rank_max - top, column, owned, target, others, total, mean, target - log_total, entropy
    )


def logit_gradient(softmax: Softmax, grad_logprobs: Tensor, entropy_slope: Tensor | None) -> Tensor:
    """Return d loss / d logits [n, V_local] of loss = Σ grad_logprobs·logp - Σ entropy_slope·entropy.

    Overwrites softmax.exps. Target column: grad · (1 - p) = grad · others / total, because 1 - p would cancel; other
    columns: -grad · p.
    Entropy: d(-entropy) / d logit = p · (log p + entropy) = p · (logit - max - mean).
    """
    per_exp = -grad_logprobs / softmax.total
    at_target = grad_logprobs * softmax.others / softmax.total
    scale = softmax.offset.exp()
    if entropy_slope is None:
        gradient = softmax.exps.mul_((scale * per_exp)[:, None])
    else:
        slope = entropy_slope / softmax.total
        at_target += slope * softmax.target.exp() * (softmax.target.clamp(min=PADDED_LOGIT) - softmax.mean)
        inner = softmax.shifted + (softmax.offset - softmax.mean)[:, None]
        inner.mul_((scale * slope)[:, None]).add_((scale * per_exp)[:, None])
        gradient = softmax.exps.mul_(inner)
    _write_target(gradient, softmax.column, softmax.owned, at_target)
    return gradient


def _write_target(chunk: Tensor, column: Tensor, owned: Tensor, value: Tensor) -> None:
    """Set the target's column of `chunk` [n, V_local] to `value` [n], in the rows whose target this rank holds."""
    chunk.scatter_(1, column, torch.where(owned, value[:, None], chunk.gather(1, column)))
