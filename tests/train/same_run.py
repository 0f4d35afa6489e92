"""The oracle of a recovery: a run that met a fault ends as one that met none."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.nn import functional

from dapo_mcore.checkpoint.run_folder import latest_checkpoint
from dapo_mcore.model_files.megatron_folder import open_store
from tests.train.runs import metrics, stable


def assert_same_run(whole: Path, other: Path, but: Collection[str] = ()) -> None:
    """Assert that two runs at one layout have the same metrics, samples, weights, optimizer and positions in data and sampler, bit for
    bit.

    but  metrics, and fields of samples, that tell of the fault itself.
    """
    _assert_equal(map(stable, _rows(whole)), map(stable, _rows(other)), but)
    _assert_equal(samples(whole), samples(other), but)
    ours, theirs = _last(whole), _last(other)
    _assert_equal([_state(ours)], [_state(theirs)], ())
    names = sorted(path.relative_to(ours) for path in ours.rglob("*.safetensors"))
    assert names == sorted(path.relative_to(theirs) for path in theirs.rglob("*.safetensors")) and len(names) > 1
    different = [str(name) for name in names if (ours / name).read_bytes() != (theirs / name).read_bytes()]
    assert not different, different


def assert_same_run_elsewhere(whole: Path, other: Path) -> None:
    """Assert that two runs at different layouts have the same samples and positions, and metrics, weights and optimizer within 1e-6."""
    _assert_equal(samples(whole), samples(other), ())
    for ours, theirs in zip(_rows(whole), _rows(other), strict=True):
        # the others count differences of the size of rounding
        names = [name for name in stable(ours) if not name.startswith("mismatch/")]
        assert {name: ours[name] for name in names} == pytest.approx({name: theirs[name] for name in names}, abs=1e-6)
    ours, theirs = _last(whole), _last(other)
    _assert_equal([_state(ours)["train"]], [_state(theirs)["train"]], ())
    first, second = stored_tensors(ours), stored_tensors(theirs)
    assert first.keys() == second.keys() and any("exp_avg_sq" in key for key in first), first.keys()
    worst = {key: _difference(first[key], second[key]) for key in first}
    assert max(worst.values()) < 1e-6, sorted(worst.items(), key=lambda item: -item[1])[:5]


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference. Rows that pad the vocabulary in one of them only are compared with zero."""
    rows = max(len(ours), len(theirs))
    ours, theirs = (functional.pad(x.double(), [0, 0] * (x.dim() - 1) + [0, rows - len(x)]) for x in (ours, theirs))
    return float((ours - theirs).abs().max())


def stored_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint, whole."""
    store = open_store(checkpoint)
    return {key: store.read(key, (0,) * len(store.size(key)), store.size(key)) for key in sorted(store.tensors)}


def _rows(run: Path) -> list[dict[str, Any]]:
    return metrics(run.parents[1], run.name)


def samples(run: Path) -> list[dict[str, Any]]:
    files = sorted((run / "samples").rglob("*.jsonl"))
    return [{"file": file.name, **json.loads(line)} for file in files for line in file.read_text().splitlines()]


def _last(run: Path) -> Path:
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None, f"{run} has no checkpoint"
    return checkpoint


def _state(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's state.json without the configuration, which names the run."""
    state = json.loads((checkpoint / "state.json").read_text())
    del state["train"]["config"]
    return state


def _assert_equal(ours: Iterable[dict[str, Any]], theirs: Iterable[dict[str, Any]], but: Collection[str]) -> None:
    count = 0
    for count, (a, b) in enumerate(zip_longest(ours, theirs, fillvalue={}), 1):
        different = {name: (a.get(name), b.get(name)) for name in {*a, *b} - {*but} if a.get(name) != b.get(name)}
        assert not different, f"row {count} differs: {different}"
    assert count, "nothing to compare"
