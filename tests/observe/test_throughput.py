"""Rates by hand, and the peaks of cards under the names that CUDA gives them."""

from __future__ import annotations

import pytest

from dapo_mcore.observe.throughput import StepWork, peak_tflops, throughput_metrics

WORK = StepWork(num_tokens=6000, num_generated=4000, train_flops=8e15)


def test_rates_are_those_of_all_processes_or_of_each() -> None:
    """8 PFLOP in 4 s on 4 GPUs are 500 TFLOP/s each, half of 1000."""
    times = {"time/step_s": 20.0, "time/generate_s": 10.0, "time/train_s": 4.0}
    assert throughput_metrics(WORK, times, num_ranks=4, peak_tflops=1000) == {
        "perf/tokens_per_s": 300.0,
        "perf/tokens_per_s_per_gpu": 75.0,
        "perf/generated_tokens_per_s": 400.0,
        "perf/tflops_per_gpu": 500.0,
        "perf/mfu/actor": 0.5,
    }
    assert "perf/mfu/actor" not in throughput_metrics(WORK, times, 4, None)
    assert "perf/tflops_per_gpu" not in throughput_metrics(WORK, {"time/step_s": 1.0}, 4, 1000)


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 836),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10G", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA GeForce RTX 4090", None),
        (None, None),
    ],
)
def test_the_peak_of_a_card(card: str | None, peak: float | None) -> None:
    assert peak_tflops(card) == peak
