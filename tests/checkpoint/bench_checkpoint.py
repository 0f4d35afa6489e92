"""Saving and loading a model with Qwen2.5-7B's shapes and fewer layers, against a plain write of the same bytes by as many processes.

    pytest -m bench tests/checkpoint/bench_checkpoint.py      290 million parameters on 1, 2 and 4 ranks; needs 17 GB of memory

The processes share one machine's cores and its disk, so only ratios within a run mean anything elsewhere. A plain write is the
bytes of a rank's part in pieces of 64 MiB into one file, and an fsync. CPU is that of all ranks; memory is what the peak of the
fullest rank rises by. Beside training, what blocks is the copy; the first one also takes its memory.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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

SIZES = dict(
    vocab_size=8_000, hidden_size=3584, intermediate_size=18_944, num_attention_heads=28, num_key_value_heads=4,
    num_hidden_layers=1, max_position_embeddings=32_768, tie_word_embeddings=False, architectures=["Qwen2ForCausalLM"],
)  # fmt: skip
PIECE = 64 << 20
ROUNDS = 2

Found = dict[str, tuple[float, float, float]]
"""Seconds, CPU seconds and peak GB of each way, best of ROUNDS."""


def measure(layout: Any, mesh: Mesh, folder: str) -> dict[str, Any]:
    """Save in every way, and load. The last checkpoint stays."""
    from dapo_mcore.checkpoint.checkpoint import load_checkpoint, save_checkpoint
    from dapo_mcore.checkpoint.saves import Saves

    run_dir, actor = Path(folder), build(layout, mesh)
    state = STATE if layout.is_controller else None
    path = save_checkpoint(run_dir, actor, state, layout, keep=1)  # creates the moments too
    share = sum(file.stat().st_size for file in path.rglob(f"rank_{layout.rank:05d}.safetensors"))
    found = {
        "plain write": best(layout, lambda: plain_write(run_dir, layout.rank, share)),
        "save at once": best(layout, lambda: save_checkpoint(run_dir, actor, state, layout, keep=1)),
    }
    saves, stalls = Saves(run_dir, layout, 1, background=True), []

    def beside() -> None:
        start = time.perf_counter()
        saves.save(actor, state, wait=False)
        stalls.append(time.perf_counter() - start)
        saves.finish()

    found["save beside training, to its end"] = best(layout, beside)
    saves.close()
    found["… of which blocks, the first"] = (max(everyone(layout, stalls[0])), 0.0, 0.0)
    found["… of which blocks, later"] = (max(everyone(layout, min(stalls[1:]))), 0.0, 0.0)
    found["load"] = best(layout, lambda: load_checkpoint(path, actor, layout))
    return {"found": found, "bytes": sum(everyone(layout, share)), "path": str(path)}


def load(layout: Any, mesh: Mesh, path: str) -> Found:
    from dapo_mcore.checkpoint.checkpoint import load_checkpoint

    actor = build(layout, mesh)
    list(actor.optimizer.shards())  # creates the moments
    return {f"load on {mesh}": best(layout, lambda: load_checkpoint(Path(path), actor, layout))}


def build(layout: Any, mesh: Mesh) -> Any:
    from dapo_mcore.actor.actor import Actor
    from dapo_mcore.model_files.hf_folder import RandomReader

    model = Qwen2Config(**SIZES)
    return Actor(make_config(mesh, model__dtype="bf16"), model, layout, RandomReader(model, seed=0))


def plain_write(run_dir: Path, rank: int, num_bytes: int) -> None:
    path, data = run_dir / f"plain_{rank}", memoryview(torch.ones(PIECE, dtype=torch.uint8).numpy())
    with open(path, "wb", buffering=0) as file:
        for start in range(0, num_bytes, PIECE):
            file.write(data[: num_bytes - start])
        os.fsync(file.fileno())
    path.unlink()


def best(layout: Any, way: Callable[[], object]) -> tuple[float, float, float]:
    rounds = []
    for _ in range(ROUNDS):
        layout.barrier()
        with PeakMemory() as memory:
            start, cpu = time.perf_counter(), time.process_time()
            way()
            cpu = time.process_time() - cpu
            layout.barrier()
            seconds = time.perf_counter() - start
        rounds.append((seconds, sum(everyone(layout, cpu)), max(everyone(layout, memory.peak_bytes)) / 1e9))
    return min(rounds)


@pytest.mark.parametrize("data", [1, 2, 4])
def test_saving_and_loading(data: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needed, free = 6 + 2.6 * data, psutil.virtual_memory().available / 1e9
    if free < needed or shutil.disk_usage(tmp_path).free < 20e9:
        pytest.skip(f"needs {needed:.0f} GB of memory and 20 GB of disk, {free:.0f} GB of memory are free")
    result = spawn(measure, Mesh(data=data), str(tmp_path))
    found: Found = result["found"]
    if data > 1:
        found |= spawn(load, Mesh(tensor=2), result["path"])
    table = Table(title=f"{result['bytes'] / 1e9:.2f} GB, {data} data-parallel ranks, best of {ROUNDS}")
    for column in ("", "s", "GB/s", "of plain", "CPU s", "peak GB a rank"):
        table.add_column(column, justify="left" if not column else "right")
    plain = found["plain write"][0]
    for what, (seconds, cpu, peak) in found.items():
        speed = (f"{seconds:.2f}", f"{result['bytes'] / seconds / 1e9:.2f}", f"{plain / seconds:.0%}")
        table.add_row(what, *speed, f"{cpu:.1f}", f"{peak:.2f}")
    with capsys.disabled():
        Console(width=120).print("\n", table)
