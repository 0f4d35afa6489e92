"""Measure times, peak memory and the machine's ceilings.

Change here: the number of repetitions and the clock. Calls rotate over as many inputs as exceed the L2 cache together.
Inputs are random, because a GPU multiplies zeros faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from tests.kernels.bench.problem import Problem

WARM_UP, FEWEST, MOST = 3, 5, 50
SECONDS = 1.0 if torch.cuda.is_available() else 0.1
ROTATED_BYTES = 256 << 20  # an H200's L2 cache holds 50 MB
GEMM_CHUNK = 8_192
COPIED_BYTES = 4 << 30
Input = TypeVar("Input")


class Timing(NamedTuple):
    """Median and the quantiles 0.2 and 0.8 of `repeats` calls, in milliseconds."""

    median: float
    p20: float
    p80: float
    repeats: int


def time_calls(
    call: Callable[[Input], object], inputs: Sequence[Input], prepare: Callable[[Input], object] = id
) -> Timing:
    """Time `call` on the `inputs` in turn, after a warm-up. `prepare` runs before each call and is not timed.

    Makes as many calls as fit into SECONDS, from FEWEST to MOST. Uses CUDA events on a GPU, otherwise the wall clock.
    """
    turn = cycle(inputs)

    def once() -> float:
        given = next(turn)
        prepare(given)
        return _milliseconds(lambda: call(given))

    typical = min(once() for _ in range(WARM_UP))
    repeats = min(max(int(SECONDS * 1e3 / max(typical, 1e-3)), FEWEST), MOST)
    times = torch.tensor([once() for _ in range(repeats)], dtype=torch.float64)
    p20, median, p80 = times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return Timing(median, p20, p80, repeats)


def peak_bytes(call: Callable[[], object]) -> int | None:
    """Return the peak of device memory that `call` adds, its results included; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def num_copies(num_bytes: int, device: torch.device) -> int:
    """Return how many inputs of `num_bytes` to rotate over; two on a CPU, so that no call can reuse a result."""
    return max(2, -(-ROTATED_BYTES // num_bytes)) if device.type == "cuda" else 2


def three_gemms(problems: Sequence[Problem]) -> Timing:
    """Time the lower bound of the head: logits, gradient to hidden and gradient to weight by the vendor's library alone.

    Works in the inputs' dtype, GEMM_CHUNK tokens at a time, and writes each product once.
    """
    hidden, weight = problems[0].hidden.detach(), problems[0].weight.detach()
    rows = min(GEMM_CHUNK, len(hidden))
    logits, grad_weight = hidden.new_empty(rows, len(weight)), torch.zeros_like(weight)
    grad_logits, grad_hidden = torch.randn_like(logits), torch.empty_like(hidden)

    def call(p: Problem) -> None:
        for start in range(0, len(hidden), rows):
            x = p.hidden.detach()[start : start + rows]
            torch.mm(x, p.weight.detach().t(), out=logits[: len(x)])
            torch.mm(grad_logits[: len(x)], p.weight.detach(), out=grad_hidden[start : start + rows])
            torch.addmm(grad_weight, grad_logits[: len(x)].t(), x, out=grad_weight)

    return time_calls(call, problems)


def copy_gb_s(device: torch.device) -> float:
    """Return the bandwidth of a device copy in 1e9 bytes per second, read and written bytes together."""
    size = COPIED_BYTES if device.type == "cuda" else COPIED_BYTES >> 8
    pairs = [(torch.randn(size // 4, device=device), torch.empty(size // 4, device=device)) for _ in range(2)]
    timing = time_calls(lambda pair: pair[1].copy_(pair[0]), pairs)
    return 2 * size / timing.median / 1e6


def _milliseconds(call: Callable[[], object]) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """Return ‖ours - exact‖₂ / ‖exact‖₂."""
    return ((ours.double() - exact).norm() / exact.norm()).item()


def worst_row_error(ours: Tensor, exact: Tensor) -> float:
    """Return the largest ‖Δ‖₂ / ‖exact‖₂ of a row; infinity for an exactly zero row unless ours is zero too."""
    wrong, size = (ours.double() - exact).norm(dim=1), exact.norm(dim=1)
    return torch.where(wrong == 0, 0.0, wrong / size).max().item()
