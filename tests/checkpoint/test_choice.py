"""Which checkpoint a start goes on from: by its name alone, on a folder without tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dapo_mcore.checkpoint.choice import is_chosen, resumed_checkpoint, take
from dapo_mcore.config.file import parse_config
from dapo_mcore.config.schema import Config
from dapo_mcore.errors import CheckpointError


def config(folder: Path, resume: int | str) -> Config:
    tree: dict[str, Any] = {"model": {"path": "model"}, "data": {"files": ["train.jsonl"]}, "name": "run"}
    return parse_config(tree | {"output_dir": str(folder), "checkpoint": {"resume": resume}})


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 4, 8 and 12; a damaged one and one that is being written do not count."""
    for name in ("step_000004", "step_000008", "step_000012", "step_000016.corrupt", "step_000020.partial"):
        (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
    return tmp_path / "run" / "checkpoints"


def names(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.iterdir())


def test_auto_takes_the_newest_and_never_takes_none(tmp_path: Path, checkpoints: Path) -> None:
    assert resumed_checkpoint(config(tmp_path, "auto")) == checkpoints / "step_000012"
    assert resumed_checkpoint(config(tmp_path, "never")) is None
    assert resumed_checkpoint(config(tmp_path / "new", "auto")) is None
    assert not is_chosen(config(tmp_path, "auto"), checkpoints / "step_000012")


@pytest.mark.parametrize("by_path", [False, True])
def test_a_run_goes_back_to_the_chosen_checkpoint_once(tmp_path: Path, checkpoints: Path, by_path: bool) -> None:
    """A job that is started again with the same arguments must not lose what it has saved since."""
    path = checkpoints / "step_000004"
    choice = config(tmp_path, str(path) if by_path else 4)
    assert resumed_checkpoint(choice) == path and is_chosen(choice, path)
    assert [moved.name for moved in take(choice, path)] == ["step_000008.set_aside", "step_000012.set_aside"]
    assert resumed_checkpoint(choice) == path and not is_chosen(choice, path)
    (checkpoints / "step_000008").mkdir()
    assert resumed_checkpoint(choice) == checkpoints / "step_000008"
    assert resumed_checkpoint(config(tmp_path, "auto")) == checkpoints / "step_000008"
    other = config(tmp_path, 8)
    assert is_chosen(other, checkpoints / "step_000008"), "another choice is taken"
    assert take(other, checkpoints / "step_000008") == []
    assert resumed_checkpoint(choice) == path, "and so is the first one after it"


def test_a_checkpoint_of_another_run_sets_all_own_ones_aside(tmp_path: Path, checkpoints: Path) -> None:
    other = tmp_path / "other" / "step_000010"
    other.mkdir(parents=True)
    choice = config(tmp_path, str(other))
    assert resumed_checkpoint(choice) == other
    assert len(take(choice, other)) == 3
    assert names(checkpoints) == [
        *("chosen.json", "step_000004.set_aside", "step_000008.set_aside", "step_000012.set_aside"),
        *("step_000016.corrupt", "step_000020.partial"),
    ]
    assert resumed_checkpoint(choice) == other, "as long as nothing has been saved since"


@pytest.mark.parametrize("resume", [9, "./step_000004", "/nowhere/weights"])
def test_a_choice_that_does_not_exist_is_refused_with_those_that_do(
    tmp_path: Path, checkpoints: Path, resume: int | str
) -> None:
    told = rf"checkpoint\.resume {resume}: .* is no checkpoint; .*run has those of rollout steps 4, 8, 12"
    with pytest.raises(CheckpointError, match=told):
        resumed_checkpoint(config(tmp_path, resume))


def test_a_damaged_note_is_not_taken_for_none(tmp_path: Path, checkpoints: Path) -> None:
    """Without the note the run would go back to the chosen checkpoint a second time."""
    take(config(tmp_path, 4), checkpoints / "step_000004")
    (checkpoints / "chosen.json").write_text(json.dumps({})[:1])
    with pytest.raises(CheckpointError, match=r"chosen\.json is damaged; delete it"):
        resumed_checkpoint(config(tmp_path, 4))
