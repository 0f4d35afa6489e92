"""When a run counts as finished, and what a new run moves aside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dapo_mcore.config.schema import Config
from dapo_mcore.earlier_run import final_export, finished_step, move_aside
from dapo_mcore.model_files.hf_folder import EXPORT


def settings(folder: Path, **sections: Any) -> Config:
    tree = {
        "output_dir": str(folder / "runs"),
        "num_rollout_steps": 3,
        "model": {"path": "unused"},
        "data": {"files": "unused.jsonl"},
    }
    return Config.model_validate(tree | sections)


def test_a_run_is_finished_with_its_last_checkpoint_or_export(tmp_path: Path) -> None:
    def finished(**sections: Any) -> int | None:
        return finished_step(settings(tmp_path, **sections))

    no_export = {"checkpoint": {"export_at_end": False}}
    assert finished(**no_export) is None
    (tmp_path / "runs/run/checkpoints/step_000003").mkdir(parents=True)
    assert finished(**no_export) == 3
    assert finished(**no_export, num_rollout_steps=4) is None
    assert finished(checkpoint={"export_at_end": False, "resume": "never"}) is None
    assert finished() is None, "the export is still to be written"
    assert final_export(settings(tmp_path)) == tmp_path / "runs/run/hf/final"


def test_a_run_of_epochs_is_finished_with_an_export_of_as_many_even_without_a_checkpoint(tmp_path: Path) -> None:
    final = tmp_path / "runs/run/hf/final"
    final.mkdir(parents=True)
    plain = {"checkpoint": {"every": None, "at_end": False}, "num_rollout_steps": None}

    def finished(exported: dict[str, Any], num_epochs: int = 2) -> int | None:
        (final / EXPORT).write_text(json.dumps(exported))
        return finished_step(settings(tmp_path, **plain, num_epochs=num_epochs))

    assert finished({"step": 7, "num_epochs": 2}) == 7
    assert finished({"step": 7, "num_epochs": 3}) == 7
    assert finished({"step": 7, "num_epochs": 2}, num_epochs=3) is None
    assert finished({"step": 7, "num_epochs": None}) is None, "of a run of num_rollout_steps"
    assert finished({"step": 7}) is None, "of an earlier version"
    (tmp_path / "runs/run/checkpoints/step_000008").mkdir(parents=True)
    assert finished({"step": 7, "num_epochs": 2}) is None, "a longer run has begun since"


def test_only_results_are_moved_aside_and_each_time_to_a_new_folder(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for name in ("logs", "servers"):
        (run_dir / name).mkdir(parents=True)
    for name in (".lock", "stop", "metrics.jsonl"):
        (run_dir / name).touch()
    assert move_aside(run_dir) is None, "no rows, so no results"
    for number in (1, 2):
        (run_dir / "metrics.jsonl").write_text("{}\n")
        (run_dir / "samples").mkdir()
        assert move_aside(run_dir) == tmp_path / f"run.old{number}"
        assert sorted(path.name for path in (tmp_path / f"run.old{number}").iterdir()) == ["metrics.jsonl", "samples"]
        assert {path.name for path in run_dir.iterdir()} == {".lock", "logs", "servers", "stop"}
