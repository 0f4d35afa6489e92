"""What a start does with damaged checkpoints, with one rank and without tensors. With ranks and tensors: test_checkpoint.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dapo_mcore.checkpoint import resume
from dapo_mcore.checkpoint.resume import load_resumed
from dapo_mcore.config.file import parse_config
from dapo_mcore.errors import CheckpointError, DamagedCheckpoint

ALONE: Any = SimpleNamespace(
    is_controller=True, broadcast_object=lambda value: value, on_controller_or_raise=lambda action: action()
)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    for step in (1, 2, 3):
        (tmp_path / "run" / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    return tmp_path / "run" / "checkpoints"


def start(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch, damaged: str, choice: int | str = "auto"
) -> tuple[str, list[str]]:
    """Return the name of the checkpoint that is loaded, and what is told, if the steps in `damaged` are damaged."""

    def load(path: Path, actor: Any, layout: Any) -> str:
        if path.name[-1] in damaged:
            raise DamagedCheckpoint(f"{path.name} is cut")
        return f"state of {path.name}"

    monkeypatch.setattr(resume, "load_checkpoint", load)
    tree: dict[str, Any] = {"model": {"path": "model"}, "data": {"files": ["train.jsonl"]}, "name": "run"}
    config = parse_config(tree | {"output_dir": str(checkpoints.parents[1]), "checkpoint": {"resume": choice}})
    lines: list[str] = []
    path, state = load_resumed(config, None, ALONE, lines.append)
    assert state == f"state of {path.name}"
    return path.name, lines


def names(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.iterdir())


def test_damaged_checkpoints_are_renamed_and_the_newest_whole_one_is_taken(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, lines = start(checkpoints, monkeypatch, damaged="32")
    assert name == "step_000001"
    assert lines == [
        f"warning: step_00000{n} is cut; step_00000{n} was renamed to step_00000{n}.corrupt, and the run goes on from "
        f"step_000001"
        for n in (3, 2)
    ]
    assert names(checkpoints) == ["step_000001", "step_000002.corrupt", "step_000003.corrupt"]


def test_if_none_is_whole_the_run_ends_and_nothing_is_renamed(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the next start would find no checkpoint and begin anew."""
    with pytest.raises(
        CheckpointError, match="3 is cut; step_000002 is cut; step_000001 is cut; no older one"
    ) as caught:
        start(checkpoints, monkeypatch, damaged="321")
    assert not isinstance(caught.value, DamagedCheckpoint)
    assert names(checkpoints) == ["step_000001", "step_000002", "step_000003"]


def test_the_chosen_checkpoint_is_taken_and_newer_ones_are_set_aside(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, lines = start(checkpoints, monkeypatch, damaged="", choice=2)
    assert name == "step_000002"
    assert lines == [
        f"{checkpoints}/step_000003 was renamed to step_000003.set_aside, since checkpoint.resume chose step_000002"
    ]
    assert start(checkpoints, monkeypatch, damaged="", choice=2) == ("step_000002", [])


def test_a_damaged_chosen_checkpoint_is_not_replaced_by_another(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        CheckpointError, match=r"2 is cut; checkpoint\.resume names this checkpoint: choose another one"
    ):
        start(checkpoints, monkeypatch, damaged="2", choice=2)
    assert names(checkpoints) == ["step_000001", "step_000002", "step_000003"]
