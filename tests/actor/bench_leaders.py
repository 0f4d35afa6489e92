"""A weight sync from two pipeline stages that both send, against rank 0 alone; and what measured rates predict for clusters.

    pytest -m bench tests/actor/bench_leaders.py            1.0 GB of Qwen2.5-7B's layers; needs 8 GB of memory

Two trainer processes, one fake server, gloo. All bytes go through the cores of one machine: the ratios of one run mean something,
not the seconds. The prediction is arithmetic on rates, not a measurement of a cluster.
"""

from __future__ import annotations

import heapq
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen2Config

from tests.actor.bench_weight_stream import SIZES
from tests.actor.parity import Mesh, make_config, spawn
from tests.rollout.sglang.fake_server import fake_python
from tests.rollout.sglang.serving import settings

pytestmark = pytest.mark.bench

ROUNDS = 3
LEADERS = {"rank 0 alone": (0,), "both stages": (0, 1)}


def measure(layout: Any, mesh: Mesh, folder: str) -> dict[str, Any]:
    """Worker: seconds of the gather and of the whole sync, best of ROUNDS, and bytes that each rank writes to sockets."""
    from dapo_mcore.actor.model.policy import build_policy
    from dapo_mcore.actor.weight_stream import WeightStream
    from dapo_mcore.architecture.shape import weight_shape
    from dapo_mcore.handover import sync_weights
    from dapo_mcore.rollout.sglang.engine import SGLangEngine
    from dapo_mcore.train.leaders import open_leaders

    hf_config = Qwen2Config(**{**SIZES, "vocab_size": 8_000}, num_hidden_layers=2)
    config = make_config(mesh, model__dtype="bf16")
    policy = build_policy(config, hf_config, layout)
    stream = WeightStream(policy, weight_shape(hf_config, layout.tensor), layout)
    found: dict[str, Any] = {"bytes": sum(streamed.nbytes for bucket in stream.plan for streamed in bucket)}
    for what, wanted in LEADERS.items():
        given = settings(
            fake_python(Path(folder)), sync="distributed", bucket_mib=128, sync_timeout_s=300.0, senders=len(wanted)
        )
        given = layout.broadcast_object(given)
        changed = config.rollout.model_copy(update={"engine": "sglang", "sglang": given})
        engine = None
        if layout.is_controller:
            place = Path(tempfile.mkdtemp(dir=folder))
            engine = SGLangEngine(given, hf_config, stop_token_ids=(1,), dtype=torch.bfloat16, folder=place)
        there = config.model_copy(update={"rollout": changed})
        leaders, peer = open_leaders(there, hf_config, layout, engine, print)
        assert leaders == wanted
        gather = _best(lambda leaders=leaders: deque(stream(leaders=leaders), maxlen=0), layout)
        before = _written()
        whole = _best(lambda e=engine, p=peer, ls=leaders: sync_weights(stream, e, 1, p, ls), layout)
        written = (_written() - before) / (ROUNDS + 1)
        found[what] = {"gather": gather, "whole": whole, "written": layout.gather_objects(written)}
        if engine is not None:
            engine.close()
        layout.barrier()
        if peer is not None:
            peer.close()
    return found


def _best(way: Callable[[], Any], layout: Any) -> float:
    seconds = []
    for _ in range(1 + ROUNDS):
        layout.barrier()
        start = time.perf_counter()
        way()
        layout.barrier()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _written() -> int:
    return psutil.Process().io_counters().write_chars


def test_two_senders_against_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = spawn(measure, Mesh(pipeline=2), str(tmp_path))
    alone = found["rank 0 alone"]
    table = Table(title=f"{found['bytes'] / 1e9:.2f} GB in bf16 from PP2 to one server by gloo, best of {ROUNDS}")
    for column in ("", "gather s", "whole s", "GB/s", "of one: gather", "whole", "sent by ranks, GB"):
        table.add_column(column, justify="right")
    for what in LEADERS:
        now = found[what]
        ratios = [f"{now[part] / alone[part]:.2f}" for part in ("gather", "whole")]
        sent = " + ".join(f"{written / 1e9:.2f}" for written in now["written"])
        rate = f"{found['bytes'] / now['whole'] / 1e9:.2f}"
        table.add_row(what, f"{now['gather']:.3f}", f"{now['whole']:.2f}", rate, *ratios, sent)
    with capsys.disabled():
        Console(width=120).print("\n", table)


class Cluster(NamedTuple):
    """A model on a layout: bytes, messages of the stream, stages, and the share of a stage that its leader has on its own node."""

    name: str
    num_bytes: float
    num_messages: int
    stages: int
    on_node: float


class Rates(NamedTuple):
    """Of a cluster.

    nic_gbs      of one GPU's NIC, each direction: 70 % of 400 Gb/s
    overlaps     a bucket is gathered beside the one that is sent; on a GPU both wait for the same stream, so perhaps not
    message_s    a message of the gather costs its leader (measured: 5.4 s of Python for 68,298 messages)
    call_s       a bucket costs at the servers besides its bytes (an estimate)
    """

    nic_gbs: float
    overlaps: bool
    message_s: float = 79e-6
    call_s: float = 5e-3


BUCKET = 256 << 20
CLUSTERS = [
    Cluster("32B on TP8·PP2, 2 + 2 nodes", 65.5e9, 2_416, 2, 1.0),
    Cluster("32B on TP8·PP2, 16 nodes", 65.5e9, 2_416, 2, 1.0),
    Cluster("235B-A22B on TP4·PP4·EP8, 16 nodes", 470e9, 68_298, 4, 1.0),
]


def predicted(cluster: Cluster, leaders: int, rates: Rates) -> tuple[float, float]:
    """Return seconds of the longest gather alone, and of the sync. Each leader gathers one bucket ahead; servers take one bucket
    at a time; with one leader the other stages come in through its NIC."""
    count = round(cluster.num_bytes / BUCKET / leaders)
    far = BUCKET * ((1 - 1 / cluster.stages) if leaders == 1 else (1 - cluster.on_node)) / (rates.nic_gbs * 1e9)
    gather = max(far, cluster.num_messages / leaders / count * rates.message_s)
    wire = BUCKET / (rates.nic_gbs * 1e9) + rates.call_s
    ready, now = [(gather, leader, 1) for leader in range(leaders)], 0.0
    while ready:  # the next bucket is gathered from the time on at which the one before it begins to be sent
        at, leader, number = heapq.heappop(ready)
        begin = max(now, at)
        now = begin + wire
        if number < count:
            heapq.heappush(ready, ((begin if rates.overlaps else now) + gather, leader, number + 1))
    return gather * count, now


def test_what_rates_predict(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(title="Predicted, not measured: seconds of the gather alone and of the whole sync")
    for column in ("", "gather and send", "one: gather", "whole", "a sender per stage: gather", "whole", "ratio"):
        table.add_column(column, justify="right")
    for cluster in CLUSTERS:
        for rates in (Rates(35.0, overlaps=True), Rates(35.0, overlaps=False)):
            one, several = (predicted(cluster, leaders, rates) for leaders in (1, cluster.stages))
            numbers = (f"{seconds:.2f}" for seconds in (*one, *several, several[1] / one[1]))
            table.add_row(cluster.name, "at once" if rates.overlaps else "in turn", *numbers)
    assert predicted(Cluster("", BUCKET * 4, 0, 2, 1.0), 2, Rates(1.0, True, 0.0, 0.0))[1] == pytest.approx(
        4 * BUCKET / 1e9
    )
    with capsys.disabled():
        Console(width=120).print("\n", table)
