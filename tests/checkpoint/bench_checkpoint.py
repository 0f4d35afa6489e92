"""Saving and loading checkpoints, against plain writes and reads of the same bytes by as many processes.

    pytest -m bench -s tests/checkpoint/bench_checkpoint.py
    pytest -m bench -s tests/checkpoint/bench_checkpoint.py --basetemp=/dev/shm/bench      without the disk's limit

The processes share one machine's cores and its disk, so only ratios within a run mean anything elsewhere. A plain write is a rank's
bytes in pieces of 64 MiB into a file, and an fsync; a plain read is the same in reverse. Before each read the files leave the page
cache. CPU is that of all ranks and their processes; memory is what the peak of the fullest rank rises by. Beside training, what
blocks is the copy into memory of its own; the first one also takes this memory.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen2Config

from tests.actor.parity import Mesh, make_config, spawn
from tests.checkpoint.resuming import STATE, everyone
from tests.model_files.peak_memory import PeakMemory

pytestmark = pytest.mark.bench

SMALL = dict(
    vocab_size=8_000, hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2,
    num_hidden_layers=4, max_position_embeddings=32_768, tie_word_embeddings=False, architectures=["Qwen2ForCausalLM"],
)  # fmt: skip
"""Qwen2.5-0.5B with fewer layers and words."""
LARGE = SMALL | dict(
    hidden_size=3584, intermediate_size=18_944, num_attention_heads=28, num_key_value_heads=4, num_hidden_layers=1
)
"""One layer of Qwen2.5-7B."""
PIECE = 64 << 20
ROUNDS = 3


class Cost(NamedTuple):
    """Seconds, CPU seconds of all ranks, and the peak of the fullest rank in bytes: the fastest of ROUNDS."""

    seconds: float
    cpu: float = 0.0
    peak_bytes: int = 0


Found = dict[str, Cost]


def measure(layout: Any, mesh: Mesh, folder: str, model: dict[str, Any]) -> dict[str, Any]:
    """Save in every way, and load. The last checkpoint stays."""
    from dapo_mcore.checkpoint.checkpoint import load_checkpoint, save_checkpoint
    from dapo_mcore.checkpoint.saves import Saves

    run_dir, actor = Path(folder), build(layout, mesh, model)
    state = STATE if layout.is_controller else None
    path = save_checkpoint(run_dir, actor, state, layout, keep=1)  # creates the moments too
    share = sum(file.stat().st_size for file in path.rglob(f"rank_{layout.rank:05d}.safetensors"))
    plain = run_dir / f"plain_{layout.rank}"
    found = {
        "plain write": best(layout, lambda: plain_write(plain, share)),
        "save": best(layout, lambda: save_checkpoint(run_dir, actor, state, layout, keep=1)),
    }
    saves, stalls = Saves(run_dir, layout, 1, background=True), []

    def beside() -> None:
        start = time.perf_counter()
        saves.save(actor, state, wait=False)
        stalls.append(time.perf_counter() - start)
        assert saves.finish() is None

    found["save beside training, to its end"] = best(layout, beside, saves.pid)
    saves.close()
    found["… of which blocks, the first"] = Cost(max(everyone(layout, stalls[0])))
    found["… of which blocks, later"] = Cost(max(everyone(layout, min(stalls[1:]))))
    found["plain read"] = best(layout, lambda: plain_read(plain), cold=[plain])
    plain.unlink()
    found["load"] = best(layout, lambda: load_checkpoint(path, actor, layout), cold=path.glob("shards/*"))
    shares = everyone(layout, share)
    return {"found": found, "bytes": sum(shares), "share": max(shares), "path": str(path)}


def load(layout: Any, mesh: Mesh, path: str, model: dict[str, Any]) -> Found:
    from dapo_mcore.checkpoint.checkpoint import load_checkpoint

    actor = build(layout, mesh, model)
    list(actor.optimizer.shards())  # creates the moments
    files = list(Path(path).glob("shards/*"))
    return {f"load on {mesh}": best(layout, lambda: load_checkpoint(Path(path), actor, layout), cold=files)}


def build(layout: Any, mesh: Mesh, model: dict[str, Any]) -> Any:
    from dapo_mcore.actor.actor import Actor
    from dapo_mcore.model_files.hf_folder import RandomReader

    config = Qwen2Config(**model)
    return Actor(make_config(mesh, model__dtype="bf16"), config, layout, RandomReader(config, seed=0))


def plain_write(path: Path, num_bytes: int) -> None:
    path.unlink(missing_ok=True)
    data = memoryview(torch.ones(PIECE, dtype=torch.uint8).numpy())
    with open(path, "wb", buffering=0) as file:
        for start in range(0, num_bytes, PIECE):
            file.write(data[: num_bytes - start])
        os.fsync(file.fileno())


def plain_read(path: Path) -> None:
    data = memoryview(torch.empty(PIECE, dtype=torch.uint8).numpy())
    with open(path, "rb", buffering=0) as file:
        while file.readinto(data):
            pass


def best(layout: Any, way: Callable[[], object], helper: int | None = None, cold: Any = ()) -> Cost:
    """Return the cost of the fastest round. `helper` is a process whose CPU time counts too, `cold` are files to be read."""
    rounds, files = [], list(cold)
    for _ in range(ROUNDS):
        for file in files:
            forget(file)
        layout.barrier()
        with PeakMemory() as memory:
            start, cpu = time.perf_counter(), cpu_time(helper)
            way()
            cpu = cpu_time(helper) - cpu
            layout.barrier()
            seconds = time.perf_counter() - start
        rounds.append(Cost(seconds, sum(everyone(layout, cpu)), max(everyone(layout, memory.peak_bytes))))
    return min(rounds)


def forget(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def cpu_time(helper: int | None) -> float:
    times = psutil.Process(helper).cpu_times() if helper else None
    return time.process_time() + (times.user + times.system if times else 0.0)


@pytest.mark.parametrize(
    ("model", "data"),
    [(SMALL, 1), (SMALL, 2), (SMALL, 4), (LARGE, 2)],
    ids=["0.5B-DP1", "0.5B-DP2", "0.5B-DP4", "7B-DP2"],
)
def test_saving_and_loading(
    model: dict[str, Any], data: int, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    needed, free = (2 if model is SMALL else 6) + 1.5 * data, psutil.virtual_memory().available / 1e9
    if free < needed or shutil.disk_usage(tmp_path).free < 20e9:
        pytest.skip(f"needs {needed:.0f} GB of memory and 20 GB of disk, {free:.0f} GB of memory are free")
    result = spawn(measure, Mesh(data=data), str(tmp_path), model)
    found = result["found"] | (spawn(load, Mesh(tensor=2), result["path"], model) if data > 1 else {})
    table = Table(
        title=f"{request.node.callspec.id}: {result['bytes'] / 1e9:.2f} GB, at most {result['share'] / 1e9:.2f} GB a rank, best of {ROUNDS}"
    )
    for column in ("", "s", "GB/s", "of plain", "CPU s", "peak GB a rank"):
        table.add_column(column, justify="left" if not column else "right")
    costs = {what: Cost(*cost) for what, cost in found.items()}
    for what, cost in costs.items():
        plain = costs["plain read" if what.startswith(("plain read", "load")) else "plain write"].seconds
        speed = (f"{cost.seconds:.2f}", f"{result['bytes'] / cost.seconds / 1e9:.2f}", f"{plain / cost.seconds:.0%}")
        table.add_row(what, *speed, f"{cost.cpu:.1f}", f"{cost.peak_bytes / 1e9:.2f}")
    with capsys.disabled():
        Console(width=120).print("\n", table)
