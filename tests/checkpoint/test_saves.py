"""When a run waits for a save, with one rank and without tensors. With ranks, tensors and failures: test_checkpoint.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from dapo_mcore.checkpoint import saves as module
from dapo_mcore.checkpoint.publish import Publication
from dapo_mcore.checkpoint.saves import Saves

ALONE: Any = SimpleNamespace(
    rank=0,
    is_controller=True,
    broadcast_object=lambda value: value,
    gather_objects=lambda value: [value],
    on_every_rank_or_raise=lambda action: action(),
    barrier=lambda: None,
)


class Process:
    """In place of the process that writes: it has `problem`, and notes what is asked of it."""

    problem: str | None = None
    calls: ClassVar[list[Any]] = []
    warnings: ClassVar = ["warning: step_000001 cannot be deleted"]
    pid = 7

    def start(self, *_: Any) -> None:
        self.calls.append("start")

    def wait(self, state: str, stall_s: float) -> str | None:
        self.calls.append(state)
        return self.problem

    def close(self, patience_s: float = 0.0) -> None:
        self.calls.append(f"close {patience_s:.0f}")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    monkeypatch.setattr(module, "SaverProcess", Process)
    monkeypatch.setattr(Process, "calls", found)
    monkeypatch.setattr(module, "Snapshot", lambda blocks: None)
    monkeypatch.setattr(module, "abandon", lambda job, layout: found.append("abandon"))
    monkeypatch.setattr(module, "save_checkpoint", lambda *_: found.append("save at once"))
    job = Publication(Path("run/checkpoints/x"), Path("run/checkpoints/step_000003"), 1, 1)
    monkeypatch.setattr(module, "begin_checkpoint", lambda *_: (job, []))
    return found


def new_saves(lines: list[str], background: bool = True) -> Saves:
    return Saves(Path("run"), ALONE, 1, lines.append, background=background)


def test_without_a_process_every_save_is_at_once(calls: list[Any]) -> None:
    saves = new_saves([], background=False)
    saves.save(None, None, wait=False)
    saves.finish()
    saves.close()
    assert calls == ["save at once"] and not saves.in_flight and saves.pid is None


def test_a_save_in_flight_ends_before_the_next_one_begins(calls: list[Any]) -> None:
    lines: list[str] = []
    saves = new_saves(lines)
    saves.save(None, None, wait=False)
    assert saves.in_flight and calls == ["start"]
    saves.save(None, None, wait=False)
    assert saves.in_flight and calls == ["start", "written", "done", "start"]
    saves.save(None, None, wait=True)
    assert not saves.in_flight and calls[4:] == ["written", "done", "save at once"]
    saves.close()
    assert calls[7:] == ["close 0"]
    assert lines == Process.warnings * 2


def test_a_failed_save_is_told_and_the_next_one_is_at_once(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    saves = new_saves(lines)
    saves.save(None, None, wait=False)
    monkeypatch.setattr(Process, "problem", "No space left on device")
    saves.save(None, None, wait=False)
    assert calls == ["start", "written", "close 0", "abandon", "save at once"] and not saves.in_flight
    told = "the checkpoint run/checkpoints/step_000003 was not saved beside training, since rank 0 failed: No space left on device"
    assert lines[-1] == f"warning: {told}; the next one is written at once, and training waits for it"
    saves.save(None, None, wait=False)
    assert (saves.finish(), saves.finish()) == (told, None)


def test_a_save_in_flight_has_some_seconds_when_the_run_ends_early(calls: list[Any]) -> None:
    saves = new_saves([])
    saves.save(None, None, wait=False)
    saves.close()
    assert calls == ["start", "close 10"]
