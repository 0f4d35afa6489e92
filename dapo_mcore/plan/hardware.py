"""The figures that a plan rests on beside arithmetic: what a GPU can do, and what part of it a run gets. One table each.

Change here: a new GPU, a better measurement. Each figure says where it comes from: `measured` (one run on an H100 80GB HBM3 with
Transformer Engine 2.11, kernels/results), `vendor` (a data sheet), or `guess`. `--assume NAME=VALUE` replaces any of them.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

from dapo_mcore.errors import ConfigError

Source = Literal["measured", "vendor", "guess", "config"]
_MAY_BE_ZERO = ("share", "B", "ms", "us", "ns")
"""Units of figures whose 0 means that something costs or hides nothing. Others divide."""


def _figure(
    default: float, unit: str, source: Source, note: str, *, least: float | None = None, most: float = math.inf
) -> Any:
    """Return a field with its bounds. least None: 0 for a cost or a share, else anything above 0."""
    if unit == "share" or unit.startswith("of "):
        most = 1.0
    if least is None and unit in _MAY_BE_ZERO:
        least = 0.0
    about = {"unit": unit, "source": source, "note": note, "least": least, "most": most}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Gpu:
    """One GPU of a node, by its vendor's data sheet. Bytes are 10^9, memory is in GiB as a driver reports it."""

    memory_gib: float = _figure(79.2, "GiB", "vendor", "GPU memory that torch sees")
    bf16_tflops: float = _figure(989, "TFLOP/s", "vendor", "dense bf16 peak")
    hbm_gbs: float = _figure(3350, "GB/s", "vendor", "bandwidth of GPU memory")
    nvlink_gbs: float = _figure(450, "GB/s", "vendor", "NVLink of one GPU, each direction")
    network_gbs: float = _figure(50, "GB/s", "vendor", "network of one GPU between nodes, each direction (400 Gb/s)")
    pcie_gbs: float = _figure(64, "GB/s", "vendor", "PCIe of one GPU to the host, each direction")
    host_gib: float = _figure(1900, "GiB", "vendor", "host memory of a node (2 TB); half of it is /dev/shm")


GPUS = {
    "h100": Gpu(),
    "h200": Gpu(memory_gib=139.8, hbm_gbs=4800),
    "b200": Gpu(memory_gib=178.0, bf16_tflops=2250, hbm_gbs=8000, nvlink_gbs=900, pcie_gbs=128),
}


@dataclass(frozen=True)
class Assumptions:
    """What part of a GPU's peak a run gets, and what a configuration does not say about its data."""

    mean_response_tokens: float = _figure(
        0, "tokens", "guess", "mean response before the cut; unless given, 35 % of max_response_tokens", least=1
    )
    response_spread: float = _figure(
        0.9, "", "guess", "sigma of log-normal response lengths, cut at the limit", least=0, most=3
    )
    mean_prompt_tokens: float = _figure(150, "tokens", "guess", "mean prompt", least=1)
    kept_ratio: float = _figure(
        0, "share", "config", "groups that vary; unless given, train_batch_prompts / gen_batch_prompts", least=0.001
    )

    copy_efficiency: float = _figure(0.90, "of hbm_gbs", "measured", "a device copy, 3,000 GB/s")
    gemm_efficiency: float = _figure(0.75, "of bf16_tflops", "measured", "products of layers, 735-750 TFLOP/s")
    narrow_values: float = _figure(
        64, "values", "guess", "a product of width n, or an expert's of n rows, reaches n / (n + this) of that", least=0
    )
    head_efficiency: float = _figure(
        0.73, "of bf16_tflops", "measured", "the policy head's three products, 720 TFLOP/s"
    )
    attention_forward: float = _figure(0.59, "of bf16_tflops", "measured", "cuDNN attention, 585 TFLOP/s")
    attention_backward: float = _figure(
        0.50, "of bf16_tflops", "measured", "the same, 490 TFLOP/s of 2.5 × the forward FLOPs"
    )
    tensorwise_gain: float = _figure(1.93, "×", "measured", "FP8 products without casts (177 ms for 342)")
    blockwise_gain: float = _figure(
        1.74, "×", "measured", "the same, from one linear layer (972 for 738 TFLOP/s with casts)"
    )
    mxfp8_gain: float = _figure(1.7, "×", "guess", "the same, on Blackwell")
    swiglu_bytes: float = _figure(
        20, "B", "measured", "both passes, per token and inner value; torch's own kernel took 53 at width 27,648"
    )
    norm_bytes: float = _figure(
        96, "B", "measured", "norms, residuals, gradients' sums: per token, layer and hidden value"
    )
    rotary_bytes: float = _figure(
        32, "B", "measured", "rotary embedding and copies: per token, layer and q, k, v value"
    )
    cast_bytes: float = _figure(
        6, "B", "measured", "FP8: amax and cast of each value of a product's input and gradient"
    )
    gradient_bytes: float = _figure(
        13.5, "B", "measured", "adding a gradient to main_grad, per parameter and micro-batch, apart from its product"
    )
    optimizer_bytes: float = _figure(
        52, "B", "measured", "zeroing, norm, clipping, Adam and copy back, per parameter and update"
    )
    layer_overhead_ms: float = _figure(
        0.7, "ms", "measured", "launches, per layer and micro-batch; twice this with FP8"
    )
    update_overhead_ms: float = _figure(20, "ms", "measured", "waits of one gradient step or scoring pass")
    nvlink_efficiency: float = _figure(0.70, "of nvlink_gbs", "guess", "collectives within a node, none hidden")
    network_efficiency: float = _figure(0.70, "of network_gbs", "guess", "collectives between nodes")
    overlap_hidden: float = _figure(
        0.8, "share", "guess", "part of the sums that overlap_grad_reduce and _param_gather hide"
    )
    ring_hidden: float = _figure(0.5, "share", "guess", "part of context parallelism's messages behind attention")
    expert_imbalance: float = _figure(1.2, "×", "guess", "tokens of the busiest expert rank over the mean", least=1)
    pcie_efficiency: float = _figure(0.8, "of pcie_gbs", "guess", "pinned copies to and from the host")

    decode_hbm_efficiency: float = _figure(
        0.75, "of hbm_gbs", "guess", "a server's decode step: weights and KV cache read"
    )
    decode_gemm_efficiency: float = _figure(0.50, "of bf16_tflops", "guess", "a server's products at large batches")
    decode_overhead_ms: float = _figure(6.0, "ms", "guess", "a decode step beside reading: launches, sampling")
    decode_sum_us: float = _figure(10.0, "us", "guess", "a decode step's sum over a server's GPUs, two per layer")
    embedded_slowdown: float = _figure(
        5.0, "×", "guess", "engine embedded: transformers' decode loop against a server's"
    )
    host_ns_per_token: float = _figure(650, "ns", "measured", "rank 0: replies, text and rewards, beside generation")
    server_fraction: float = _figure(
        0.85, "share", "guess", "mem-fraction-static where server_args has none", least=0.01
    )
    sync_gbs: float = _figure(20, "GB/s", "guess", "distributed: rank 0's broadcast to the servers")
    disk_sync_gbs: float = _figure(
        1.1, "GB/s", "measured", "sync disk over /dev/shm: written and loaded, 0.7 GB in 0.67 s"
    )
    changed_bytes: float = _figure(0.07, "share", "guess", "delta: bytes of changes to those of all weights, 3 to 7 %")
    tensor_sync_gbs: float = _figure(14.8, "GB/s", "measured", "sync tensor over CUDA IPC")

    reserve_gib: float = _figure(2.5, "GiB", "guess", "CUDA context, NCCL's buffers, cuBLAS' workspace", least=0)
    fragmentation: float = _figure(0.05, "share", "guess", "of activations and scratch, lost to the allocator")
    host_bytes_per_token: float = _figure(
        70, "B", "measured", "rank 0's host: rollouts, batches and metrics per generated token"
    )
    micro_batch_bytes: float = _figure(
        58, "B", "measured", "a rank's micro-batches on the host, per token of its replica's share (54-61)"
    )
    process_gib: float = _figure(6, "GiB", "guess", "host memory of one training process or server", least=0)


class Entry(NamedTuple):
    """A row of the table of figures. `source` is `yours` for one that an option has set."""

    name: str
    value: float
    unit: str
    source: str
    note: str


def entries(*tables: Gpu | Assumptions, chosen: Sequence[str] = ()) -> Iterator[Entry]:
    """Yield all figures of the tables, in their order."""
    for table in tables:
        for own in fields(table):
            source = "yours" if own.name in chosen else own.metadata["source"]
            yield Entry(own.name, getattr(table, own.name), own.metadata["unit"], source, own.metadata["note"])


def assume(gpu: Gpu, assumptions: Assumptions, chosen: dict[str, float]) -> tuple[Gpu, Assumptions]:
    """Return both tables with the chosen figures. Raises ConfigError for an unknown name or an impossible figure."""
    known: dict[str, Field[Any]] = {own.name: own for table in (gpu, assumptions) for own in fields(table)}
    for name, value in chosen.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            raise ConfigError(
                f"--assume {name}: there is no such figure{f'; did you mean {near[0]}?' if near else ''} "
                f"`--figures` lists all {len(known)}"
            )
        _check(known[name], value)
    own = {name for name in chosen if hasattr(gpu, name)}
    return (
        replace(gpu, **{name: chosen[name] for name in own}),
        replace(assumptions, **{name: value for name, value in chosen.items() if name not in own}),
    )


def _check(figure: Field[Any], value: float) -> None:
    least, most = figure.metadata["least"], figure.metadata["most"]
    if math.isfinite(value) and value <= most and (value > 0 if least is None else value >= least):
        return
    low = "above 0" if least is None else f"of at least {least:g}"
    high = f" and at most {most:g}" if math.isfinite(most) else ""
    raise ConfigError(f"--assume {figure.name}={value:g}: give a finite number {low}{high} ({figure.metadata['note']})")
