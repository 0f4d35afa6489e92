"""Tokens and floating-point operations per second of a rollout step.

Change here: the rates that a run records, and the peak of a new card.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

PEAK_TFLOPS = {
    **{"GB300": 2500, "B300": 2250, "GB200": 2500, "B200": 2250},
    **{"GH200": 989, "H200": 989, "H200 NVL": 836, "H100": 989, "H100 PCIe": 756, "H100 NVL": 835},
    **{"H800": 989, "H800 PCIe": 756, "H20": 148},
    **{"A100": 312, "A800": 312, "A40": 150, "L40S": 362, "L40": 181, "L20": 119.5, "L4": 121, "A10": 125},
}
"""Dense bf16 TFLOP/s by NVIDIA's data sheets. The longest entry whose words are in a card's name is its own."""


@dataclass(frozen=True)
class StepWork:
    """What a rollout step has done.

    num_tokens     tokens trained on, prompts and responses
    num_generated  response tokens generated, without tool output
    train_flops    FLOPs of all gradient steps, forward and backward (architecture/flops.py)
    """

    num_tokens: int
    num_generated: float
    train_flops: float


def throughput_metrics(
    work: StepWork, times: Mapping[str, float], num_ranks: int, peak_tflops: float | None
) -> dict[str, float]:
    """Return the `perf/…` metrics of a step. `times` are its `time/…` metrics; a rate is left out where its time is.

    num_ranks    training processes, one per GPU
    peak_tflops  of one GPU; None leaves out perf/mfu/actor
    """
    step_s, generate_s, train_s = (times.get(f"time/{name}_s", 0.0) for name in ("step", "generate", "train"))
    tokens_per_s = work.num_tokens / max(step_s, 1e-9)
    found = {
        "perf/tokens_per_s": tokens_per_s,
        "perf/tokens_per_s_per_gpu": tokens_per_s / num_ranks,
        "perf/generated_tokens_per_s": work.num_generated / max(generate_s, 1e-9),
    }
    if train_s:
        found["perf/tflops_per_gpu"] = work.train_flops / train_s / num_ranks / 1e12
        if peak_tflops:
            found["perf/mfu/actor"] = found["perf/tflops_per_gpu"] / peak_tflops
    return found


def card_name() -> str | None:
    """Return the name of this process's GPU; None on a CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def peak_tflops(card: str | None) -> float | None:
    """Return the card's entry in PEAK_TFLOPS; None for an unknown card, a part of one (MIG) and a CPU."""
    names = [name for name in PEAK_TFLOPS if card and "MIG" not in card and re.search(rf"\b{name}\b", card)]
    return PEAK_TFLOPS[max(names, key=len)] if names else None
