"""Bandwidth of the memory-bound kernels, compared with a device copy in the same run.

Change here: which kernels, and how many bytes each requests. A second read counts, although it may come from L2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from dapo_mcore.kernels.fp8_quant import quantize_blocks, quantize_rows
from dapo_mcore.kernels.policy_loss import Objective, TokenInputs
from dapo_mcore.kernels.policy_loss.dispatch import choose
from dapo_mcore.kernels.policy_loss.shard import VocabShard
from dapo_mcore.kernels.swiglu import choose as choose_swiglu
from dapo_mcore.kernels.swiglu import torch_path as swiglu_in_torch

from tests.kernels.bench.measure import Timing, num_copies, time_calls
from tests.kernels.bench.problem import MLP_WIDTHS, Shape


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
    """Measure the loss over [rows, V] logits in fp32 and `dtype`, FP8 quantisation of a [V, H] weight in `dtype`, and SwiGLU."""
    for logits_dtype in dict.fromkeys((torch.float32, dtype)):
        yield from policy_loss_passes(rows, shape.vocab, logits_dtype, dtype, device)
    size = shape.vocab * shape.hidden
    copies = num_copies(size * dtype.itemsize, device)
    weights = [torch.randn(shape.vocab, shape.hidden, device=device).to(dtype) for _ in range(copies)]
    for what, quantize in _fp8_blocks(device).items():
        title = f"FP8 blocks of 128{what}, [{shape.vocab}, {shape.hidden}] {name(dtype)}"
        yield Pass(title, time_calls(quantize, weights), size * (dtype.itemsize + 1))
    timing = time_calls(quantize_rows, weights)
    yield Pass(f"FP8 rows, [{shape.vocab}, {shape.hidden}] {name(dtype)}", timing, size * (2 * dtype.itemsize + 1))
    yield from swiglu_passes(rows, MLP_WIDTHS[shape.model] // shape.tensor_parallel, dtype, device)


def _fp8_blocks(device: torch.device) -> dict[str, Callable]:
    """Return the quantisation, and on a GPU other forms of its kernel; the last one was its only form on 2026-11-26."""
    if device.type != "cuda":
        return {"": quantize_blocks}
    from dapo_mcore.kernels.fp8_quant import kernel

    return {
        "": quantize_blocks,
        ", 8 warps": partial(kernel.quantize_blocks, block=128, warps=8),
        ", 32 warps": partial(kernel.quantize_blocks, block=128, warps=32),
        ", 32 warps, integer rounding": partial(kernel.quantize_blocks, block=128, hardware=False),
    }


def swiglu_passes(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Iterator[Pass]:
    """Measure SwiGLU and its gradient for [rows, width] outputs, and on a GPU the same formulas through torch.compile."""
    size = rows * width * dtype.itemsize
    copies = num_copies(3 * size, device)
    inputs = [torch.randn(rows, 3 * width, device=device).to(dtype).split((2 * width, width), 1) for _ in range(copies)]
    weights = torch.rand(rows, 1, device=device)
    chosen = choose_swiglu(inputs[0][0])
    calls = {
        "SwiGLU": (lambda given: chosen.forward(given[0], None), 3),
        "SwiGLU's gradient": (lambda given: chosen.backward(given[1], given[0], None), 5),
        "SwiGLU's gradient, weighted": (lambda given: chosen.backward(given[1], given[0], weights), 5),
    }
    if device.type == "cuda":
        forward, backward = torch.compile(swiglu_in_torch.forward), torch.compile(swiglu_in_torch.backward)
        calls["SwiGLU, torch.compile"] = (lambda given: forward(given[0], None), 3)
        calls["SwiGLU's gradient, torch.compile"] = (lambda given: backward(given[1], given[0], None), 5)
    for what, (call, times) in calls.items():
        yield Pass(f"{what}, [{rows}, {width}] {name(dtype)}", time_calls(call, inputs), times * size)


def policy_loss_passes(
    rows: int, vocab: int, logits_dtype: torch.dtype, grad_dtype: torch.dtype, device: torch.device
) -> Iterator[Pass]:
    """Measure logits to losses and gradient, in place: two reads and one write. No row is clipped, which would be cheaper.

    Then logits to log-probs and entropies alone, one read.
    """
    ones, targets = torch.ones(rows, device=device), torch.randint(0, vocab, (rows,), device=device)
    tokens, shard = TokenInputs(ones, ones / rows), VocabShard.of(vocab, None, None)
    fresh = (2 * torch.randn(rows, vocab, device=device)).to(logits_dtype)
    copies = [torch.empty_like(fresh) for _ in range(2)]
    kernel, size, title = choose("auto", fresh), rows * vocab, f"[{rows}, {vocab}] {name(logits_dtype)} logits"
    timing = time_calls(
        lambda logits: kernel.differentiate(logits, targets, tokens, Objective(), shard, 1.0, grad_dtype),
        copies,
        prepare=lambda logits: logits.copy_(fresh),
    )
    yield Pass(f"loss and gradient, {title}", timing, size * (2 * logits_dtype.itemsize + grad_dtype.itemsize))
    timing = time_calls(
        lambda logits: kernel.score(logits, targets, shard, 1.0), copies, prepare=lambda logits: logits.copy_(fresh)
    )
    yield Pass(f"log-probs alone, {title}", timing, size * logits_dtype.itemsize)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
