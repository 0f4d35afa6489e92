"""Changed values against whole weights: encoding, bytes, applying, and a whole sync to a fake server.

    pytest -m bench -s tests/rollout/sglang/sync/bench_delta.py     a layer of Qwen2.5-1.5B, 0.1 GB in bf16; needs 2 GB

Everything runs on the cores of one machine, so only ratios to the whole weights of the same run mean anything elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Qwen2Config

from dapo_mcore.architecture.manifest import WeightManifest, buckets
from dapo_mcore.rollout.sglang.engine import SGLangEngine
from dapo_mcore.rollout.sglang.server_side.dapo_mcore_delta import bits, load
from dapo_mcore.rollout.sglang.sync.delta import DeltaSender
from dapo_mcore.rollout.sglang.sync.distributed import DistributedSender
from tests.rollout.sglang.fake_server import fake_python
from tests.rollout.sglang.serving import STOP, settings

pytestmark = pytest.mark.bench

SIZES = dict(
    vocab_size=1024, hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2,
    num_hidden_layers=1, tie_word_embeddings=False, architectures=["Qwen2ForCausalLM"],
)  # fmt: skip
SHARES, ROUNDS, BUCKET = (0.01, 0.02, 0.03, 0.1), 3, 32 << 20
Weights = dict[str, Tensor]


class Model:
    """Takes weights as SGLang's loaders do, into memory that it has."""

    def __init__(self, weights: Weights):
        self.parameters = {name: tensor.clone() for name, tensor in weights.items()}

    def load_weights(self, pairs: Iterator[tuple[str, Tensor]]) -> None:
        for name, tensor in pairs:
            self.parameters[name].copy_(tensor)


def changed(weights: Weights, share: float) -> Weights:
    """Return the weights with the lowest bit of that share of values flipped, spread at random."""
    new = {}
    for name, tensor in weights.items():
        flips = (torch.rand(tensor.shape) < share).to(torch.int16)
        new[name] = (bits(tensor) ^ flips).view(tensor.dtype)
    return new


def best(rounds: list[Callable[[], Any]]) -> float:
    """Return the shortest time in seconds."""
    times = []
    for action in rounds:
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def encoder(weights: Weights) -> DeltaSender:
    """Return a sender whose snapshot is the weights, and whose servers hold them."""
    sender = DeltaSender(DistributedSender("127.0.0.1", "gloo", 1.0), BUCKET)
    for _ in sender._kept(buckets(iter(weights.items()), BUCKET)):
        pass
    return sender


def test_encode_and_apply() -> None:
    torch.manual_seed(0)
    shapes = WeightManifest.of_config(Qwen2Config(**SIZES)).shapes
    old = {name: (torch.randn(shape) * 0.02).bfloat16() for name, shape in shapes.items()}
    whole_bytes = sum(tensor.nbytes for tensor in old.values())
    model = Model(old)
    copy_s = best([lambda: model.load_weights(old.items())] * ROUNDS)
    table = Table("changed", "bytes", "encode s", "apply s", "of whole: bytes", "encode", "apply")
    table.add_row("all (whole)", f"{whole_bytes / 1e6:.0f} MB", "-", f"{copy_s:.2f}", "1.000", "-", "1.0")
    load(model, [])
    for share in SHARES:
        encode_s = apply_s = float("inf")
        for _ in range(ROUNDS):
            sender, new = encoder(old), changed(old, share)
            start = time.perf_counter()
            sent = list(sender._encoded(buckets(iter(new.items()), BUCKET)))
            middle = time.perf_counter()
            for bucket, _ in sent:
                model.load_weights(bucket)
            encode_s, apply_s = min(encode_s, middle - start), min(apply_s, time.perf_counter() - middle)
            assert all(torch.equal(bits(model.parameters[name]), bits(tensor)) for name, tensor in new.items())
            model.load_weights(old.items())
        num_bytes = sender.numbers["sync/delta_bytes"]
        ratios = f"{num_bytes / whole_bytes:.3f}", f"{encode_s / copy_s:.1f}", f"{apply_s / copy_s:.1f}"
        table.add_row(f"{share:.0%}", f"{num_bytes / 1e6:.0f} MB", f"{encode_s:.2f}", f"{apply_s:.2f}", *ratios)
        assert num_bytes < (3 * share + 0.01) * whole_bytes
    Console(width=140).print(table)


@pytest.mark.parametrize("sync", ["tensor", "distributed"])
def test_a_sync_to_a_fake_server(tmp_path, sync) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(**SIZES)
    shapes = WeightManifest.of_config(config).shapes
    old = {name: (torch.randn(shape) * 0.02).bfloat16() for name, shape in shapes.items()}
    given = settings(fake_python(tmp_path), sync=sync, delta=True, bucket_mib=64)
    made = SGLangEngine(given, config, stop_token_ids=(STOP,), dtype=torch.bfloat16, folder=tmp_path / "servers")
    table = Table("changed", "sent", "sync s", "of whole")
    try:
        made.update_weights(iter(old.items()), 0)
        whole_s = best([lambda: _whole(made, old)] * ROUNDS)
        table.add_row("all (whole)", f"{made.metrics()['sync/bytes'] / 1e6:.0f} MB", f"{whole_s:.2f}", "1.00")
        for share in SHARES:
            seconds = []
            for _ in range(ROUNDS):
                old = changed(old, share)
                start = time.perf_counter()
                made.update_weights(iter(old.items()), made.weight_version + 1)
                seconds.append(time.perf_counter() - start)
            sent = made.metrics()["sync/delta_bytes"]
            table.add_row(
                f"{share:.0%}", f"{sent / 1e6:.0f} MB", f"{min(seconds):.2f}", f"{min(seconds) / whole_s:.2f}"
            )
    finally:
        made.close()
    Console(width=100).print(f"sync {sync}", table)


def _whole(made: SGLangEngine, weights: Weights) -> None:
    """Send everything, as after a server has come back."""
    made.sender._snapshot.version = None
    made.update_weights(iter(weights.items()), made.weight_version + 1)


PCIE, FAST, SLOW, COPY = 55e9, 45e9, 11e9, 3e12
"""Bytes/s: PCIe 5 × 16 and a NIC of 400 and of 100 Gbit/s (assumed), and a copy on an H100 (measured: 3,000 GB/s)."""
TENSOR_S = 150e-6
"""Seconds that a tensor of changes costs a GPU's host in Python and launches, on each side (assumed)."""
MODELS = {"32B, TP8·PP2": (65.5e9, 33e9, 771, 0.17), "235B-A22B, TP4·PP4": (470e9, 352e9, 36_945, 5.4)}
"""Bytes of all weights and from other nodes, tensors, and seconds of Python in the stream (measured on a CPU)."""


def predicted(model: str, nic: float, share: float | None, num_groups: int = 1) -> float:
    """Return the seconds of a sync from one rank 0. Stages overlap, so the slowest counts; Python is added.

    share  of changed values; None: all weights travel.
    """
    num_bytes, from_others, num_tensors, python_s = MODELS[model]
    gather_s = from_others / nic
    if share is None:
        return max(gather_s, num_groups * num_bytes / nic) + python_s
    compare_s = max(num_bytes / PCIE, 4 * num_bytes / COPY)
    return max(gather_s, compare_s, num_groups * 2.1 * share * num_bytes / nic) + python_s + 2 * num_tensors * TENSOR_S


def test_what_measured_rates_predict_for_clusters() -> None:
    """Gathering to rank 0 stays whole. So changes help where sending is the limit: several groups, or a slow network."""
    table = Table("model", "NIC", "groups", "whole s", *(f"{share:.0%} s" for share in SHARES))
    for model in MODELS:
        for nic, groups in ((FAST, 1), (FAST, 4), (SLOW, 1), (SLOW, 4)):
            times = [predicted(model, nic, share, groups) for share in (None, *SHARES)]
            table.add_row(model, f"{nic * 8 / 0.9e9:.0f} Gbit/s", str(groups), *(f"{time:.1f}" for time in times))
    Console(width=110).print(table)
    assert predicted("32B, TP8·PP2", SLOW, 0.02) < predicted("32B, TP8·PP2", SLOW, None)
