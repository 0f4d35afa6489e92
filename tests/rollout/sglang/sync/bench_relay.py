"""Weights to one server on each of 2 and 3 nodes: by a shared folder, and by relays.

    pytest -m bench tests/rollout/sglang/sync/bench_relay.py        1.2 GB; needs 12 GB of memory

Each process is a node, all on one machine, and gloo carries the buckets. So only ratios of one run mean anything elsewhere. The
folder is in this machine's page cache; a real one is read over the network, once by each server. Written are files and gloo's
sockets. gloo's broadcast is a binomial tree: its root sends once for every doubling of the ranks; NCCL's ring sends once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from transformers import Qwen2Config

from dapo_mcore.architecture.manifest import WeightManifest
from dapo_mcore.handover import sync_weights
from tests.measured import report
from tests.rollout.sglang.node_job import Node, broadcast_object, run_job
from tests.rollout.sglang.serving import engine

pytestmark = pytest.mark.bench

CONFIG = Qwen2Config(
    vocab_size=8000, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=1, num_attention_heads=28,
    num_key_value_heads=4, max_position_embeddings=32_768, tie_word_embeddings=False, architectures=["Qwen2ForCausalLM"],
)  # fmt: skip
ROUNDS = 3


class Trainer:
    """Has all weights on rank 0."""

    def __init__(self, node: Node):
        self.layout, self._node = node.layout, node
        shapes = WeightManifest.of_config(CONFIG).shapes if node.rank == 0 else {}
        self._tensors = [(name, torch.zeros(shape)) for name, shape in shapes.items()]
        self.num_bytes = sum(tensor.nbytes for _, tensor in self._tensors)

    def __call__(self, empty: Any = None, leaders: Any = (0,)) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._tensors


def measure(node: Node) -> list[dict[str, Any]]:
    """Return a row for each way, on rank 0."""
    trainer, rows = Trainer(node), []
    place = dict(placement="nodes", host="node", num_servers=node.size, config=CONFIG, bucket_mib=128)
    for sync in ("disk", "tensor"):
        if node.rank:
            best(node, partial(sync_weights, trainer, None, 0, node.peer if sync == "tensor" else None))
            continue
        relays = node.relays if sync == "tensor" else None
        with engine(node.folder, nodes=node.nodes, relays=relays, sync=sync, sync_timeout_s=300.0, **place) as made:
            rows.append(row(f"sync {sync}", trainer, best(node, partial(sync_weights, trainer, made, 0))))
    buffer = torch.zeros(broadcast_object(trainer.num_bytes), dtype=torch.uint8)
    found = best(node, lambda: dist.broadcast(buffer, 0))
    node.host.close()
    return [] if node.rank else [*rows, row("one gloo broadcast", trainer, found)]


def best(node: Node, way: Any) -> tuple[float, list[int]]:
    """Return the best time, and the bytes that each rank wrote in it."""
    found = []
    for _ in range(1 + ROUNDS):
        dist.barrier()
        before, start = psutil.Process().io_counters().write_chars, time.perf_counter()
        way()
        dist.barrier()
        seconds, written = time.perf_counter() - start, psutil.Process().io_counters().write_chars - before
        of_ranks: list[Any] = [None] * node.size
        dist.all_gather_object(of_ranks, written)
        found.append((seconds, of_ranks))
    return min(found[1:])


def row(what: str, trainer: Trainer, found: tuple[float, list[int]]) -> dict[str, Any]:
    seconds, written = found
    share = " ".join(f"{count / trainer.num_bytes:.2f}" for count in written)
    return {"": what, "s": seconds, "GB/s": trainer.num_bytes / 1e9 / seconds, "written by each rank": share}


@pytest.mark.parametrize("nodes", [2, 3])
def test_a_folder_and_relays(nodes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_job(measure, nodes, tmp_path, timeout_s=500) == [0] * nodes, (tmp_path / "told").read_text()
    rows = json.loads((tmp_path / "told").read_text())
    with capsys.disabled():
        report(f"relay-{nodes}", f"{nodes} nodes, one server on each; bytes as multiples of the model", rows)
