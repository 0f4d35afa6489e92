"""Conversion of a checkpoint with the real shapes of Qwen2.5-7B against a plain copy of its files: GB/s and memory.

    pytest -m bench tests/convert/bench_convert.py -k cut       2 layers, 2.9 GB
    pytest -m bench tests/convert/bench_convert.py -k whole     28 layers, 15.2 GB; needs 50 GB of disk

Each conversion is a process of its own, as a user starts it: importing torch and transformers counts. Copies and conversions
both end on the disk (fsync). The two folders lie in pytest's temporary folder (--basetemp gives another).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen2Config

from dapo_mcore.architecture.shape import weight_shape
from dapo_mcore.model_files.hf_folder import plan_files, tensor_groups, write_index
from dapo_mcore.model_files.safetensors_file import SafetensorsWriter

pytestmark = pytest.mark.bench

CONVERT = Path(__file__).parents[2] / "tools" / "convert.py"
SIZES = dict(
    vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_attention_heads=28, num_key_value_heads=4,
    rope_theta=1e6, max_position_embeddings=32_768, architectures=["Qwen2ForCausalLM"], dtype="bfloat16",
)  # fmt: skip
RANKS = ("--tensor-parallel", "4", "--pipeline-parallel", "2")


class Run(NamedTuple):
    what: str
    seconds: float
    peak_gb: float | None


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A checkpoint of random weights, written tensor by tensor."""
    layers = request.param
    needed = 6 if layers < 28 else 50
    free = shutil.disk_usage(tmp_path).free / 1e9
    if free < needed:
        pytest.skip(f"needs {needed} GB of disk, {free:.0f} GB are free")
    config = Qwen2Config(**SIZES, num_hidden_layers=layers)
    source = tmp_path / "hf"
    source.mkdir()
    config.save_pretrained(source)
    files = plan_files(tensor_groups(weight_shape(config, 1), lambda _: torch.bfloat16), 4_000_000_000)
    for name, tensors in files.items():
        writer = SafetensorsWriter(source / name, tensors)
        for tensor, info in tensors.items():
            writer.write(tensor, torch.empty(info.shape, dtype=torch.bfloat16).normal_(std=0.02))
        writer.close()
    write_index(source, files)
    yield source
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    "folder", [pytest.param(2, id="cut"), pytest.param(28, id="whole", marks=pytest.mark.slow)], indirect=True
)
def test_conversion_and_copy(folder: Path, show: Callable[[Table], None]) -> None:
    mcore, back, copy = (folder.with_name(name) for name in ("mcore", "back", "copy"))
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    largest = SIZES["vocab_size"] * SIZES["hidden_size"] * 2
    runs = [_copy(folder, copy), _convert("hf-to-mcore", folder, mcore, *RANKS)]
    shutil.rmtree(copy)
    runs.append(_convert("mcore-to-hf", mcore, back))
    shutil.rmtree(mcore)
    runs.append(_copy(back, copy))
    show(_table(num_bytes, largest, runs))
    assert _convert("verify", folder, back).seconds


def _copy(source: Path, target: Path) -> Run:
    """A plain copy of the files, flushed to disk."""
    target.mkdir()
    start = time.perf_counter()
    for path in source.glob("*.safetensors"):
        shutil.copyfile(path, target / path.name)
        with open(target / path.name, "rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    return Run(f"plain copy of {source.name}/", seconds, None)


def _convert(command: str, *arguments: Path | str) -> Run:
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, CONVERT, command, *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"{command} ended with {status}"
    # the kernel counts KiB
    return Run(command, time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9)


def _table(num_bytes: int, largest: int, runs: list[Run]) -> Table:
    copy = sum(run.seconds for run in runs if run.peak_gb is None) / 2
    table = Table(
        title=f"{num_bytes / 1e9:.2f} GB in bf16, largest tensor {largest / 1e9:.2f} GB, cut for {' '.join(RANKS)}"
    )
    for column in ("", "s", "GB/s", "of the mean copy", "peak memory GB"):
        table.add_column(column, justify="left" if not column else "right")
    for run in runs:
        peak = "" if run.peak_gb is None else f"{run.peak_gb:.2f}"
        table.add_row(
            run.what, f"{run.seconds:.1f}", f"{num_bytes / run.seconds / 1e9:.2f}", f"{copy / run.seconds:.0%}", peak
        )
    return table


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Callable[[Table], None]:
    """Prints past pytest's capture."""

    def print_now(table: Table) -> None:
        with capsys.disabled():
            Console(width=120).print("\n", table)

    return print_now
