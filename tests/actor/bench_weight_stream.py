"""Weight sync of Qwen2.5-7B's real shapes from a TP2 actor against plain copies of the same bytes: GB/s and memory.

    pytest -m bench tests/actor/bench_weight_stream.py -k 2-layers     2.9 GB; needs 16 GB of memory, shared memory included
    pytest -m bench tests/actor/bench_weight_stream.py -k 8-layers     5.9 GB; needs 32 GB
    pytest -m bench tests/actor/bench_weight_stream.py -k servers      0.5 GB to 1, 2 and 4 servers; needs 6 GB

Two processes over gloo hold the actor; one fake server, a process of its own, receives. All bytes go through the cores of
one machine, so only ratios to the plain copies of the same run mean anything elsewhere. Memory is what rank 0's peak
(VmHWM) rises by during a sync; the server's and the files' are not in it.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from transformers import Qwen2Config

from dapo_mcore.actor.weight_stream import WeightStream
from dapo_mcore.architecture.manifest import WeightManifest
from dapo_mcore.handover import sync_weights
from tests.actor.parity import Mesh, make_config, spawn
from tests.model_files.peak_memory import PeakMemory

pytestmark = pytest.mark.bench

SIZES = dict(
    vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_attention_heads=28, num_key_value_heads=4,
    rope_theta=1e6, max_position_embeddings=32_768, tie_word_embeddings=False, architectures=["Qwen2ForCausalLM"],
)  # fmt: skip
CHUNK = 256 << 20
ROUNDS = 2


def measure(layout: Any, mesh: Mesh, folder: str, layers: int) -> dict[str, Any]:
    """Return seconds and peak bytes of every way, the best of ROUNDS, on rank 0."""
    from dapo_mcore.actor.model.policy import build_policy
    from dapo_mcore.architecture.shape import weight_shape

    hf_config = Qwen2Config(**SIZES, num_hidden_layers=layers)
    policy = build_policy(make_config(mesh, model__dtype="bf16"), hf_config, layout)
    for _, weight in policy.named_weights():
        weight.detach().normal_(std=0.02)
    stream = WeightStream(policy, weight_shape(hf_config, layout.tensor), layout)
    sizes = [tensor.nbytes for _, tensor in stream()]
    ways: dict[str, Callable[[], None]] = {
        "copy to new memory": lambda: _clone(sum(sizes)) if layout.is_controller else None,
        "copy in memory": lambda: _copy(sum(sizes)) if layout.is_controller else None,
        "file in shared memory": lambda: _write(sum(sizes)) if layout.is_controller else None,
        "gloo broadcast to one process": lambda: _broadcast(layout.broadcast_object(sum(sizes))),
        "gather to rank 0, nothing else": lambda: deque(stream(), maxlen=0),
    }
    found = {what: _best(way, layout) for what, way in ways.items()}
    for path, num_ranks in (("disk", 1), ("distributed", 1), ("tensor", 1), ("tensor", 2)):
        engine = _engine(folder, path, hf_config, tensor_parallel=num_ranks) if layout.is_controller else None
        way = lambda engine=engine: sync_weights(stream, engine, version=1)  # noqa: E731
        found[f"sync {path}" + " to 2 ranks" * (num_ranks > 1)] = _best(way, layout, warm_up=path != "disk")
        if engine is not None:
            if path == "disk":
                found["… of which written"] = engine.metrics()["sync/write_s"], found["sync disk"][1]
            engine.close()
    return {"bytes": sum(sizes), "largest": max(sizes, default=0), "found": found}


def _best(way: Callable[[], None], layout: Any, warm_up: bool = True) -> tuple[float, int]:
    seconds, peaks = [], []
    for _ in range(ROUNDS + warm_up):
        layout.barrier()
        with PeakMemory() as memory:
            start = time.perf_counter()
            way()
            seconds.append(time.perf_counter() - start)
        peaks.append(memory.peak_bytes)
    return min(seconds[warm_up:]), max(peaks)


def _engine(folder: str, path: str, hf_config: Any, **changes: Any) -> Any:
    from dapo_mcore.rollout.sglang.engine import SGLangEngine
    from tests.rollout.sglang.fake_server import fake_python
    from tests.rollout.sglang.serving import settings

    given = settings(fake_python(Path(folder)), sync=path, **{"bucket_mib": 512, "sync_timeout_s": 300.0, **changes})
    return SGLangEngine(
        given,
        hf_config,
        stop_token_ids=(1,),
        dtype=torch.bfloat16,
        folder=Path(tempfile.mkdtemp(prefix=f"servers-{path}-", dir=folder)),
    )


def _clone(num_bytes: int) -> None:
    source = torch.ones(CHUNK, dtype=torch.uint8)
    for start in range(0, num_bytes, CHUNK):
        source[: num_bytes - start].clone()


def _copy(num_bytes: int) -> None:
    source, target = torch.ones(CHUNK, dtype=torch.uint8), torch.ones(CHUNK, dtype=torch.uint8)
    for _ in range(num_bytes // CHUNK):
        target.copy_(source)
    target[: num_bytes % CHUNK].copy_(source[: num_bytes % CHUNK])


def _write(num_bytes: int) -> None:
    source, path = memoryview(torch.ones(CHUNK, dtype=torch.uint8).numpy()), Path("/dev/shm/dapo_mcore-bench")
    try:
        with open(path, "wb", buffering=0) as file:
            for start in range(0, num_bytes, CHUNK):
                file.write(source[: num_bytes - start])
    finally:
        path.unlink(missing_ok=True)


def _broadcast(num_bytes: int) -> None:
    buffer = torch.ones(CHUNK, dtype=torch.uint8)
    for start in range(0, num_bytes, CHUNK):
        dist.broadcast(buffer[: num_bytes - start], src=0)


@pytest.mark.parametrize("layers", [pytest.param(2, id="2-layers"), pytest.param(8, id="8-layers")])
def test_sync_and_plain_copies(layers: int, tmp_path: Path, show: Callable[[Table], None]) -> None:
    needed = 5.5 * (2.2 + 0.47 * layers)  # actor, two versions of files, the server's copy, buckets
    free = min(psutil.virtual_memory().available, shutil.disk_usage("/dev/shm").free * 2) / 1e9
    if free < needed:
        pytest.skip(f"needs {needed:.0f} GB of memory, {free:.0f} GB are free")
    show(_table(spawn(measure, Mesh(tensor=2), str(tmp_path), layers), layers))


@pytest.mark.parametrize("num_servers", [1, 2, 4])
def test_servers_in_one_group_and_in_their_own(num_servers: int, tmp_path: Path, show: Callable[[Table], None]) -> None:
    """Bytes are what this process writes, gloo's sockets included. gloo's broadcast is a binomial tree: its root sends
    once for every doubling of the ranks; NCCL's ring sends once."""
    hf_config = Qwen2Config(**{**SIZES, "vocab_size": 8_000, "num_hidden_layers": 1})
    tensors = [(n, torch.zeros(s, dtype=torch.bfloat16)) for n, s in WeightManifest.of_config(hf_config).shapes.items()]
    table = Table(title=f"{sum(t.nbytes for _, t in tensors) / 1e9:.2f} GB in bf16 by gloo, best of {ROUNDS}")
    for column in ("servers", "groups", "s", "GB/s to each", "sent GB", "passes"):
        table.add_column(column, justify="right")
    for per_group in [None, 1] if num_servers > 1 else [None]:
        engine = _engine(
            str(tmp_path),
            "distributed",
            hf_config,
            num_servers=num_servers,
            servers_per_group=per_group,
            bucket_mib=128,
        )
        found = []
        for version in range(1 + ROUNDS):
            before, start = _written(), time.perf_counter()
            engine.update_weights(iter(tensors), version)
            found.append((time.perf_counter() - start, _written() - before))
        engine.close()
        (seconds, sent), size = min(found[1:]), sum(t.nbytes for _, t in tensors)
        numbers = (f"{seconds:.2f}", f"{size / seconds / 1e9:.2f}", f"{sent / 1e9:.2f}", f"{sent / size:.2f}")
        table.add_row(str(num_servers), str(1 if per_group is None else num_servers), *numbers)
    show(table)


def _written() -> int:
    return psutil.Process().io_counters().write_chars


def _table(result: dict[str, Any], layers: int) -> Table:
    num_bytes, found = result["bytes"], result["found"]
    copy, broadcast = found["copy in memory"][0], found["gloo broadcast to one process"][0]
    table = Table(
        title=f"{num_bytes / 1e9:.2f} GB in bf16: {layers} layers of Qwen2.5-7B, largest tensor "
        f"{result['largest'] / 1e9:.2f} GB; TP2 over gloo, bucket_mib 512, best of {ROUNDS}"
    )
    for column in ("", "s", "GB/s", "of the copy", "of the broadcast", "peak GB"):
        table.add_column(column, justify="left" if not column else "right")
    for what, (seconds, peak) in found.items():
        ratios = (f"{copy / seconds:.0%}", f"{broadcast / seconds:.0%}")
        table.add_row(what, f"{seconds:.2f}", f"{num_bytes / seconds / 1e9:.2f}", *ratios, f"{peak / 1e9:.2f}")
    return table


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Callable[[Table], None]:
    """Return a function that prints past pytest's capture."""

    def print_now(table: Table) -> None:
        with capsys.disabled():
            Console(width=120).print("\n", table)

    return print_now
