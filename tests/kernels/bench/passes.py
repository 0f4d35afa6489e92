"""Bandwidth of the memory-bound kernels, compared with a device copy in the same run.

Change here: which kernels, and how many bytes each requests. A second read counts, although it may come from L2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from dapo_mcore.kernels.fp8_quant import quantize_blocks, quantize_rows
from dapo_mcore.kernels.policy_loss import Objective, TokenInputs
from dapo_mcore.kernels.policy_loss.dispatch import choose
from dapo_mcore.kernels.policy_loss.shard import VocabShard

from tests.kernels.bench.measure import Timing, num_copies, time_calls
from tests.kernels.bench.problem import Shape


@dataclass(frozen=True, slots=True)
class Pass:
    """Timing of one kernel on one shape; a call reads and writes `num_bytes`."""

    name: str
    timing: Timing
    num_bytes: int

    @property
    def gb_s(self) -> float:
        return self.num_bytes / self.timing.median / 1e6


def measure_passes(shape: Shape, rows: int, dtype: torch.dtype, device: torch.device) -> Iterator[Pass]:
    """Measure the loss over [rows, V] logits in fp32 and `dtype`, and FP8 quantisation of a [V, H] weight in `dtype`."""
    for logits_dtype in dict.fromkeys((torch.float32, dtype)):
        yield policy_loss_pass(rows, shape.vocab, logits_dtype, dtype, device)
    size = shape.vocab * shape.hidden
    copies = num_copies(size * dtype.itemsize, device)
    weights = [torch.randn(shape.vocab, shape.hidden, device=device).to(dtype) for _ in range(copies)]
    timing = time_calls(quantize_blocks, weights)
    yield Pass(f"FP8 blocks of 128, [{shape.vocab}, {shape.hidden}] {name(dtype)}", timing, size * (dtype.itemsize + 1))
    timing = time_calls(quantize_rows, weights)
    yield Pass(f"FP8 rows, [{shape.vocab}, {shape.hidden}] {name(dtype)}", timing, size * (2 * dtype.itemsize + 1))


def policy_loss_pass(
    rows: int, vocab: int, logits_dtype: torch.dtype, grad_dtype: torch.dtype, device: torch.device
) -> Pass:
    """Measure logits to losses and gradient, in place: two reads and one write. No row is clipped, which would be cheaper."""
    ones, targets = torch.ones(rows, device=device), torch.randint(0, vocab, (rows,), device=device)
    tokens, shard = TokenInputs(ones, ones / rows), VocabShard.of(vocab, None, None)
    fresh = (2 * torch.randn(rows, vocab, device=device)).to(logits_dtype)
    copies = [torch.empty_like(fresh) for _ in range(2)]
    kernel = choose("auto", fresh)
    timing = time_calls(
        lambda logits: kernel.differentiate(logits, targets, tokens, Objective(), shard, 1.0, grad_dtype),
        copies,
        prepare=lambda logits: logits.copy_(fresh),
    )
    num_bytes = rows * vocab * (2 * logits_dtype.itemsize + grad_dtype.itemsize)
    return Pass(f"loss and gradient, [{rows}, {vocab}] {name(logits_dtype)} logits", timing, num_bytes)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
