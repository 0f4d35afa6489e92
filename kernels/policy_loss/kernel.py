"""The DAPO loss in Triton: from log-probs, or from vocabulary-parallel logits with the gradient in the same memory.

Change here: how kernels are launched, and how the work is divided. row_softmax.py has the softmax of a row,
token_terms.py the formula of a token. One program owns one row of logits: there are no atomics, every sum has a fixed
order, and equal inputs give equal bits. A row is read twice and written once; if the vocabulary is split, an all-gather of
the rows' statistics comes between the two reads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .records import Objective, PolicyHeadOutput, TokenInputs, TokenTerms
from .row_softmax import at_peak, gradient_row, local_target, merged_statistics, row_softmax, row_statistics, zero_row
from .shard import VocabShard
from .token_terms import token_terms

INTERPRETED = triton.knobs.runtime.interpret

# Columns per step of the loop that sums and of the loop that writes gradients. With 16 warps a thread needs at most 64
# registers, so two programs fit on a multiprocessor and their loads overlap. The two numbers must differ: with equal ones
# the compiler gives both loops the layout of the gradient's dtype. The scoring pass, which has no gradient, would then
# add in another order than the training pass.
SUM_BLOCK = 4096
GRADIENT_BLOCK = 8192
ROW_WARPS = 16
# Without fused multiply-add a formula rounds equally in every kernel: scoring and training agree bitwise.
ROW_OPTIONS = {"enable_fp_fusion": False}
BLOCK_TOKENS = 256
TOKEN_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

LOG2_E = tl.constexpr(1.4426950408889634)


class Constants(NamedTuple):
    """The Objective in the form of the kernels: None compiles a term away."""

    ratio_low: float
    ratio_high: float
    dual_clip: float | None
    kl_coef: float
    entropy_coef: float | None
    cispo: int | None  # 1 for the form cispo

    @classmethod
    def of(cls, objective: Objective) -> Constants:
        o = objective
        cispo = 1 if o.form == "cispo" else None
        return cls(1 - o.clip_low, 1 + o.clip_high, o.dual_clip, float(o.kl_coef), o.entropy_coef or None, cispo)


def token_losses(logprobs: Tensor, tokens: TokenInputs, objective: Objective) -> TokenTerms:
    """Return torch_path.token_losses for fp32 `logprobs` [T]."""
    fields = logprobs.new_empty(7, len(logprobs))
    if len(logprobs):
        token_losses_kernel[(triton.cdiv(len(logprobs), BLOCK_TOKENS),)](
            logprobs.contiguous(),
            contiguous(tokens),
            Constants.of(objective),
            fields,
            len(logprobs),
            KL=objective.kl_estimator,
            BLOCK=BLOCK_TOKENS,
            **TOKEN_OPTIONS,
        )
    loss, grad, ratio, low, high, dual, kl = fields
    return TokenTerms(loss, grad, ratio, low != 0, high != 0, dual != 0, kl)


def score(
    logits: Tensor, targets: Tensor, shard: VocabShard, temperature: float, *, keep_logits: bool = False
) -> tuple[Tensor, Tensor]:
    """Return torch_path.score. `logits` stay unchanged in any case."""
    fields = _launch(logits, targets, TokenInputs(None, None), Objective(), shard, temperature, None)
    return fields[1], fields[2]


def differentiate(
    logits: Tensor,
    targets: Tensor,
    tokens: TokenInputs,
    objective: Objective,
    shard: VocabShard,
    temperature: float,
    grad_dtype: torch.dtype | None,
    *,
    keep_logits: bool = False,
) -> tuple[PolicyHeadOutput, Tensor | None]:
    """Return torch_path.differentiate for fp32 or bf16 `logits`."""
    grad = None
    if grad_dtype is not None:
        shared = not keep_logits and grad_dtype.itemsize <= logits.dtype.itemsize
        grad = gradient_view(logits, grad_dtype) if shared else torch.empty_like(logits, dtype=grad_dtype)
    fields = _launch(logits, targets, contiguous(tokens), objective, shard, temperature, grad)
    loss, logprobs, entropy, ratio, low, high, dual, kl = fields
    return PolicyHeadOutput(loss, logprobs, entropy, ratio, low != 0, high != 0, dual != 0, kl), grad


def gradient_view(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a view [n, V_local] in `dtype` of the memory of `logits`; `dtype` must not be wider than theirs.

    A narrower view takes the end of each row. A program that processes a row from its end then writes only where it has
    already read.
    """
    if dtype == logits.dtype:
        return logits
    columns = logits.shape[1]
    return logits.view(dtype)[:, -columns:]


def _overlap(grad: Tensor | None, logits: Tensor) -> bool:
    """Return True if `grad` is a narrower view of the memory of `logits`."""
    if grad is None or grad.dtype == logits.dtype:
        return False
    return grad.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()


def contiguous(tokens: TokenInputs) -> TokenInputs:
    return TokenInputs(*(tensor if tensor is None else tensor.contiguous() for tensor in tokens))


def _launch(
    logits: Tensor,
    targets: Tensor,
    tokens: TokenInputs,
    objective: Objective,
    shard: VocabShard,
    temperature: float,
    grad: Tensor | None,
) -> Tensor:
    """Return the fields of PolicyHeadOutput as fp32 [8, n] and write the gradient to `grad`. Scoring sets only 1 and 2."""
    num_rows, num_columns = logits.shape
    fields = logits.new_empty(8, num_rows, dtype=torch.float32)
    if num_rows == 0:
        return fields
    targets = targets.contiguous()
    row_losses_kernel[(num_rows,)](
        logits,
        logits.stride(0),
        num_columns,
        shard.num_real,
        targets,
        shard.start,
        _all_statistics(logits, targets, shard, temperature),
        shard.num_ranks,
        tokens,
        Constants.of(objective),
        1 / temperature,
        fields,
        num_rows,
        grad,
        0 if grad is None else grad.stride(0),
        KL=objective.kl_estimator,
        SHARED_ROWS=_overlap(grad, logits),
        BLOCK=SUM_BLOCK // _share(logits),
        GRADIENT_BLOCK=GRADIENT_BLOCK // _share(logits),
        num_warps=ROW_WARPS // _share(logits),
        **ROW_OPTIONS,
    )
    return fields


def _all_statistics(logits: Tensor, targets: Tensor, shard: VocabShard, temperature: float) -> Tensor | None:
    """Return row_statistics of all ranks, fp32 [R, 4, n]; None for one rank, which needs no second launch."""
    if shard.num_ranks == 1:
        return None
    statistics = logits.new_empty(4, len(logits), dtype=torch.float32)
    row_statistics_kernel[(len(logits),)](
        logits,
        logits.stride(0),
        shard.num_real,
        targets,
        shard.start,
        1 / temperature,
        statistics,
        len(logits),
        BLOCK=SUM_BLOCK // _share(logits),
        num_warps=ROW_WARPS // _share(logits),
        **ROW_OPTIONS,
    )
    return shard.all_gather(statistics)


def _share(logits: Tensor) -> int:
    """Return the divisor of a program's size: for bf16 logits an H100 took 1.27 ms with half the size, and 1.31 with all of it."""
    return 4 // logits.itemsize


@triton.jit
def token_losses_kernel(logprobs, tokens, objective, fields, num_tokens, KL: tl.constexpr, BLOCK: tl.constexpr):
    """Write the fields of TokenTerms to `fields` [7, T], with loss and derivative times the token weight."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < num_tokens
    logprob = tl.load(logprobs + at, mask=mask, other=0.0)
    weight = tl.load(tokens.token_weights + at, mask=mask, other=0.0)
    loss, grad, ratio, low, high, dual, kl = token_terms(logprob, tokens, at, mask, objective, KL)
    tl.store(fields + at, weight * loss, mask=mask)
    tl.store(fields + num_tokens + at, weight * grad, mask=mask)
    tl.store(fields + 2 * num_tokens + at, ratio, mask=mask)
    tl.store(fields + 3 * num_tokens + at, low.to(tl.float32), mask=mask)
    tl.store(fields + 4 * num_tokens + at, high.to(tl.float32), mask=mask)
    tl.store(fields + 5 * num_tokens + at, dual.to(tl.float32), mask=mask)
    tl.store(fields + 6 * num_tokens + at, kl, mask=mask)


@triton.jit
def row_statistics_kernel(
    logits, row_stride, num_real, targets, start, inverse_temperature, statistics, num_rows, BLOCK: tl.constexpr
):
    """Write row_statistics of this rank's columns to `statistics` [4, n]."""
    row = tl.program_id(0).to(tl.int64)
    target = local_target(targets, row, start, num_real)
    top, total, weighted, target_logit = row_statistics(
        logits + row * row_stride, num_real, target, inverse_temperature * LOG2_E, BLOCK
    )
    tl.store(statistics + row, top)
    tl.store(statistics + num_rows + row, total)
    tl.store(statistics + 2 * num_rows + row, weighted)
    tl.store(statistics + 3 * num_rows + row, target_logit)


@triton.jit
def row_losses_kernel(
    logits,
    row_stride,
    num_columns,
    num_real,
    targets,
    start,
    statistics,
    num_ranks,
    tokens,
    objective,
    inverse_temperature,
    fields,
    num_rows,
    grad,
    grad_stride,
    KL: tl.constexpr,
    SHARED_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GRADIENT_BLOCK: tl.constexpr,
):
    """Write PolicyHeadOutput to `fields` [8, n] and the gradient to `grad` [n, num_columns] unless it is None.

    With empty `tokens` only log-prob and entropy are written.
    statistics   [R, 4, n] of all ranks; None for one rank, whose statistics are computed here.
    SHARED_ROWS  `grad` lies in the rows of `logits` in a narrower dtype (see gradient_view).
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    target = local_target(targets, row, start, num_real)
    scale = inverse_temperature * LOG2_E

    if statistics is None:
        top, total, weighted, target_logit = row_statistics(logits, num_real, target, scale, BLOCK)
        peak = tl.maximum(top, target_logit)
        others, distance = at_peak(top, total, weighted, peak, scale)
    else:
        peak, others, distance, target_logit = merged_statistics(statistics + row, num_rows, num_ranks, scale)
    logprob, entropy, total, mean, target_exp, target_share = row_softmax(
        peak, others, distance, target_logit, inverse_temperature
    )
    tl.store(fields + num_rows + row, logprob)
    tl.store(fields + 2 * num_rows + row, entropy)

    if tokens.advantages is not None:
        weight, slope = store_loss(fields + row, num_rows, row, logprob, entropy, tokens, objective, KL)
        if grad is not None:
            slope *= weight * inverse_temperature
            bonus = 0.0
            if objective.entropy_coef is not None:
                bonus = objective.entropy_coef * weight * inverse_temperature
            # d loss / d logit = exp · (constant + rate · (logit - peak)), but for the target 1 - p would cancel
            at_target = (slope * others + bonus * (target_share - target_exp * mean)) / total
            constant = (-slope - bonus * mean) / total
            rate = bonus * inverse_temperature / total
            grad += row * grad_stride
            tl.debug_barrier()  # every warp must read the target's logit before one writes
            if (slope == 0) & (bonus == 0):
                zero_row(grad, num_columns, GRADIENT_BLOCK)
            else:
                gradient_row(
                    logits, grad, num_columns, num_real, target, at_target, peak, scale, constant, rate,
                    objective.entropy_coef is not None, SHARED_ROWS, GRADIENT_BLOCK,
                )  # fmt: skip


@triton.jit
def store_loss(fields, num_rows, row, logprob, entropy, tokens, objective, KL: tl.constexpr):
    """Write a token's loss and other fields. Return its weight, and d loss / d logprob without that weight."""
    weight = tl.load(tokens.token_weights + row)
    loss, slope, ratio, low, high, dual, kl = token_terms(logprob, tokens, row, None, objective, KL)
    if objective.entropy_coef is not None:
        loss -= objective.entropy_coef * entropy
    tl.store(fields, weight * loss)
    tl.store(fields + 3 * num_rows, ratio)
    tl.store(fields + 4 * num_rows, low.to(tl.float32))
    tl.store(fields + 5 * num_rows, high.to(tl.float32))
    tl.store(fields + 6 * num_rows, dual.to(tl.float32))
    tl.store(fields + 7 * num_rows, kl)
    return weight, slope
