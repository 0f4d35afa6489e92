"""Profiles of a block: a trace with its operations, or nothing at all."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from dapo_mcore.observe.profile import profiled


def test_a_trace_names_the_operations_of_the_block(tmp_path: Path) -> None:
    told: list[str] = []
    path = tmp_path / "profile" / "step_000002.json.gz"
    with profiled(path, told.append):
        torch.ones(8, 8) @ torch.ones(8, 8)
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert "aten::mm" in {event.get("name") for event in events}
    assert len(told) == 1 and str(path) in told[0]


def test_without_a_path_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.profiler, "profile", None)
    with profiled(None, pytest.fail):
        assert not torch.autograd.profiler._is_profiler_enabled


def test_a_file_that_cannot_be_written_is_told_and_training_goes_on(tmp_path: Path) -> None:
    told: list[str] = []
    (tmp_path / "profile").write_text("a file where a folder should be")
    with profiled(tmp_path / "profile" / "step_000001.json.gz", told.append):
        torch.ones(1)
    assert len(told) == 1 and told[0].startswith("warning: cannot write the profile") and "training goes on" in told[0]


def test_a_block_that_raises_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "step_000001.json.gz"
    with pytest.raises(ZeroDivisionError), profiled(path, pytest.fail):
        raise ZeroDivisionError
    assert not path.exists()
