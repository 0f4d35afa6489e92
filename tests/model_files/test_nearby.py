"""The folders that an error proposes if the given path holds no model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dapo_mcore.errors import CheckpointError
from dapo_mcore.model_files.nearby import Kind, check_model_folder


def make(folder: Path, *files: str) -> Path:
    for name in ("config.json", *files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def megatron(folder: Path) -> Path:
    return make(folder, "megatron/.metadata", "megatron/metadata.json")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that was interrupted while it wrote a checkpoint."""
    folder = tmp_path / "runs/a"
    for step in (90, 100):
        megatron(folder / f"checkpoints/step_{step:06d}")
    megatron(folder / "checkpoints/step_000110.partial")
    make(folder / "hf/final", "model.safetensors")
    make(folder / "servers/model")
    (folder / "metrics.jsonl").touch()
    return folder


def told(folder: Path, kind: Kind = "any") -> str:
    with pytest.raises(CheckpointError) as error:
        check_model_folder(folder, kind)
    return str(error.value)


def test_a_runs_folder_proposes_its_checkpoints_and_exports(run):
    old, new, export = *(run / f"checkpoints/step_{step:06d}" for step in (90, 100)), run / "hf/final"
    lacks = f"{run} holds no Megatron checkpoint: it lacks megatron/.metadata; "
    assert told(run, "Megatron") == f"{lacks}give one of {old}, {new}"
    assert told(run / "checkpoints", "Megatron").endswith(f"; give one of {old}, {new}")
    no_model = f"{run} holds no model: no config.json in it; "
    assert told(run) == f"{no_model}give one of {old}, {new}, {export}"
    assert told(run, "Hugging Face") == f"{no_model}give {export}"


def test_a_folder_with_a_model_of_the_kind_is_accepted(run):
    new, export = run / "checkpoints/step_000100", run / "hf/final"
    for folder, kind in ((new, "any"), (new, "Megatron"), (export, "any"), (export, "Hugging Face")):
        check_model_folder(folder, kind)


def test_the_inside_of_a_checkpoint_proposes_the_folder_around_it(run):
    new = run / "checkpoints/step_000100"
    assert told(new / "megatron", "Megatron").endswith(f"; give {new}")


def test_a_mistyped_step_proposes_the_existing_ones(run):
    found = told(run / "checkpoints/step_100", "Megatron")
    assert re.search(r"step_100 is not a folder; give one of .*step_000090, .*step_000100$", found)


def test_many_checkpoints_are_counted_and_the_newest_named(tmp_path):
    for step in range(1, 8):
        megatron(tmp_path / f"checkpoints/step_{step:06d}")
    found = told(tmp_path, "Megatron")
    assert re.search(r"give one of \S+step_000004, .*step_000007 \(and 3 before\)$", found)


def test_if_no_model_is_near_the_kinds_of_folders_are_named(tmp_path):
    absent, bare = tmp_path / "absent", make(tmp_path / "bare")
    kinds = "a Hugging Face model folder, one that hf-to-mcore wrote, or a run's checkpoints/step_N"
    assert told(absent) == f"{absent} is not a folder; give {kinds}"
    assert told(absent, "Hugging Face") == f"{absent} is not a folder; give a Hugging Face model folder"
    assert told(bare).startswith(f"{bare} has no weights: it holds neither model.safetensors nor ")
    assert told(bare, "Megatron").endswith("; give one that hf-to-mcore wrote, or a run's checkpoints/step_N")


def test_a_checkpoint_without_its_config_is_named(run):
    new = run / "checkpoints/step_000100"
    (new / "config.json").unlink()
    assert told(new, "Megatron").startswith(f"{new} holds no model: no config.json in it; give ")
