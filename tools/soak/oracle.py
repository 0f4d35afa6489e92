"""Whether a run that was disturbed equals the one that was not: rows, samples, weights and optimizer, bit for bit.

Change here: what is compared. Times, speed and memory are not.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dapo_mcore.checkpoint.run_folder import latest_checkpoint
from dapo_mcore.model_files.megatron_folder import Store, open_store

_MACHINES = ("time/", "perf/", "memory/")
_MODEL = "hf/final/model.safetensors"


def differences(
    expected: Path, found: Path, *, bitwise: bool = True, without_samples: Collection[int] = ()
) -> list[str]:
    """Return what is different in the run folder `found`, the first difference of each aspect; nothing if all is equal.

    bitwise           False compares the steps alone: a real server's samples depend on the time.
    without_samples   steps whose samples are not compared.
    """
    steps = list(_steps(expected, found))
    if not bitwise:
        return steps
    aspects = (
        _rows(expected, found),
        _samples(expected, found, without_samples),
        _checkpoints(expected, found),
        _exports(expected, found),
    )
    return steps + [text for aspect in aspects if (text := next(aspect, None))]


def _steps(expected: Path, found: Path) -> Iterator[str]:
    wanted, steps = ([row["step"] for row in _read(folder)] for folder in (expected, found))
    if missing := sorted(set(wanted) - set(steps)):
        yield f"metrics.jsonl has no row of step {missing[0]}"
    if repeated := [step for step, count in Counter(steps).items() if count > 1]:
        yield f"metrics.jsonl has {steps.count(repeated[0])} rows of step {repeated[0]}"
    if not missing and not repeated and steps != wanted:
        yield f"metrics.jsonl has the steps {steps}, not {wanted}"


def _rows(expected: Path, found: Path) -> Iterator[str]:
    rows = {row["step"]: row for row in _read(found)}
    for wanted in _read(expected):
        row = rows.get(wanted["step"], {})
        for name in sorted(wanted.keys() | row.keys()):
            if row and not name.startswith(_MACHINES) and wanted.get(name) != row.get(name):
                yield f"step {wanted['step']}: {name} is {row.get(name)}, not {wanted.get(name)}"


def _samples(expected: Path, found: Path, without: Collection[int]) -> Iterator[str]:
    names = {path.relative_to(run) for run in (expected, found) for path in (run / "samples").rglob("*.jsonl")}
    for name in sorted(names):
        wanted, lines = (_lines(folder / name) for folder in (expected, found))
        if wanted != lines and int(name.stem.removeprefix("step_")) not in without:
            pairs = enumerate(zip(wanted, lines), start=1)
            first = next((number for number, (a, b) in pairs if a != b), min(len(wanted), len(lines)) + 1)
            yield f"{name} differs in line {first}"


def _checkpoints(expected: Path, found: Path) -> Iterator[str]:
    wanted, path = latest_checkpoint(expected), latest_checkpoint(found)
    if wanted is None or path is None or wanted.name != path.name:
        yield f"the last checkpoint is {path and path.name}, not {wanted and wanted.name}"
        return
    ours, theirs = open_store(wanted), open_store(path)
    for key in sorted(ours.tensors.keys() | theirs.tensors.keys()):
        if not (key in ours.tensors and key in theirs.tensors):
            yield f"{path.name}: tensor {key} is in only one of the two"
        elif not torch.equal(a := _bits(ours, key), b := _bits(theirs, key)):
            yield f"{path.name}: tensor {key} differs{_first_bit(a, b)}"
    if _state(wanted) != _state(path):
        yield f"{path.name}: state.json differs"
    if (wanted / "state.safetensors").read_bytes() != (path / "state.safetensors").read_bytes():
        yield f"{path.name}: state.safetensors differs"


def _exports(expected: Path, found: Path) -> Iterator[str]:
    if not (found / _MODEL).exists() or (expected / _MODEL).read_bytes() != (found / _MODEL).read_bytes():
        yield f"{_MODEL} differs"


def _read(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _lines(run_dir / "metrics.jsonl")]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _bits(store: Store, key: str) -> Tensor:
    """Return the bytes of a whole tensor, in its own order however it was sharded. Checks their checksums."""
    size = store.size(key)
    return store.read(key, [0] * len(size), size).reshape(-1).view(torch.uint8)


def _first_bit(expected: Tensor, found: Tensor) -> str:
    if expected.shape != found.shape:
        return f": {len(found)} bytes, not {len(expected)}"
    byte = int((expected != found).nonzero()[0])
    return f" in byte {byte}: {int(found[byte]):08b}, not {int(expected[byte]):08b}"


def _state(checkpoint: Path) -> Mapping[str, Any]:
    state = json.loads((checkpoint / "state.json").read_bytes())
    del state["train"]["config"]  # it names the folder
    return state
