"""The softmax of one row of logits and its gradient in Triton: parts of the kernels in kernel.py.

Change here: how the GPU computes the softmax of softmax.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .token_terms import log1p

# Replaces -inf: exp still gives 0, but 0 · x is 0 where 0 · -inf would be nan.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def local_target(targets, row, start, num_real):
    """Return the target's column on this rank, or -1 if another rank has it."""
    target = tl.load(targets + row) - start
    return tl.where((target >= 0) & (target < num_real), target, -1)


@triton.jit
def load_logits(logits, columns, num_real):
    """Return logits in fp32, at least LOWEST, and LOWEST in padded columns; nan stays nan."""
    x = tl.load(logits + columns, mask=columns < num_real, other=float("-inf")).to(tl.float32)
    return tl.maximum(x, LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_statistics(logits, num_real, target, scale, BLOCK: tl.constexpr):
    """Return max, Σ e, Σ e · (logit - max) of one row without its target, and the target's logit.

    e = 2^(scale · (logit - max)). Each lane keeps its own three sums until the end, so the loop has no barrier. One
    exponential per column serves both cases: with a new maximum it shrinks the sums, otherwise the summand. The target
    is left out so that 1 - p keeps its digits. The max of a rank without real columns is LOWEST. The target's logit is
    -inf if another rank has it.
    """
    target_logit = tl.load(logits + target, mask=target >= 0, other=float("-inf")).to(tl.float32)
    top = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, num_real, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        x = tl.where(columns == target, LOWEST, load_logits(logits, columns, num_real))
        step = x - top
        decay = tl.exp2(-tl.abs(step) * scale)
        rises = step > 0
        weighted = tl.where(rises, tl.fma(-step, total, weighted) * decay, tl.fma(step, decay, weighted))
        total = tl.where(rises, tl.fma(total, decay, 1.0), total + decay)
        top = tl.maximum(top, x)
    row_top = tl.max(top, 0)
    total, weighted = at_peak(top, total, weighted, row_top, scale)
    return row_top, tl.sum(total, 0), tl.sum(weighted, 0), target_logit


@triton.jit
def at_peak(top, total, weighted, peak, scale):
    """Return Σ e and Σ e · (logit - peak) for a larger maximum `peak`."""
    step = top - peak
    decay = tl.exp2(step * scale)
    return decay * total, decay * (weighted + step * total)


@triton.jit
def merged_statistics(statistics, num_rows, num_ranks, scale):
    """Return, over all ranks, the largest logit, Σ e and Σ e · (logit - largest) without the target, and its logit."""
    top = tl.load(statistics)
    target_logit = tl.load(statistics + 3 * num_rows)
    for rank in range(1, num_ranks):
        top = tl.maximum(top, tl.load(statistics + 4 * rank * num_rows))
        target_logit = tl.maximum(target_logit, tl.load(statistics + (4 * rank + 3) * num_rows))
    peak = tl.maximum(top, target_logit)
    others = 0.0
    distance = 0.0
    for rank in range(num_ranks):
        top = tl.load(statistics + 4 * rank * num_rows)
        total = tl.load(statistics + (4 * rank + 1) * num_rows)
        weighted = tl.load(statistics + (4 * rank + 2) * num_rows)
        total, weighted = at_peak(top, total, weighted, peak, scale)
        others += total
        distance += weighted
    return peak, others, distance, target_logit


@triton.jit
def row_softmax(peak, others, distance, target_logit, inverse_temperature):
    """Return log-prob, entropy, Σ exp, mean, and the target's exp and share in the mean, from merged statistics.

    exp and mean are of (logit - largest) / temperature.
    """
    target_z = (target_logit - peak) * inverse_temperature
    target_exp = tl.exp(target_z)
    # A target outside the vocabulary has no share in the mean; 0 · -inf would be nan.
    target_share = tl.where(target_exp == 0, 0.0, target_exp * target_z)
    total = others + target_exp
    mean = (distance * inverse_temperature + target_share) / total
    # When the target is the largest logit, others may be below the rounding of 1.
    log_total = tl.where(target_z == 0, log1p(others), tl.log(total))
    return target_z - log_total, log_total - mean, total, mean, target_exp, target_share


@triton.jit
def gradient_row(
    logits, grad, num_columns, num_real, target, at_target, peak, scale, constant, rate,
    ENTROPY: tl.constexpr, SHARED_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a row of `grad` from its end: the columns that row_statistics read last may still be in the L2 cache."""
    num_blocks = tl.cdiv(num_columns, BLOCK)
    for step in range(num_blocks):
        columns = (num_blocks - 1 - step) * BLOCK + tl.arange(0, BLOCK)
        x = load_logits(logits, columns, num_real) - peak
        if SHARED_ROWS:
            tl.debug_barrier()  # all warps must read this block before one of them overwrites it
        value = tl.exp2(x * scale)
        if ENTROPY:
            value *= tl.fma(x, rate, constant)
        else:
            value *= constant
        value = tl.where(columns == target, at_target, value)
        tl.store(grad + columns, value.to(grad.dtype.element_ty), mask=columns < num_columns)


@triton.jit
def zero_row(grad, num_columns, BLOCK: tl.constexpr):
    for first in range(0, num_columns, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        tl.store(grad + columns, tl.zeros((BLOCK,), grad.dtype.element_ty), mask=columns < num_columns)
