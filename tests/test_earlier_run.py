"""When a run counts as finished, and what a new run moves aside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dapo_mcore.config.schema import Config
from dapo_mcore.earlier_run import final_export, finished_step, move_aside


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
