"""The best checkpoints by the rows of their own steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dapo_mcore.checkpoint.best import METRICS, Best, best_checkpoints
from dapo_mcore.checkpoint.run_folder import all_checkpoints, checkpoint_path, step_of
from tests.checkpoint.stored_checkpoint import write_checkpoint

NAME = "val/aime/mean@8"
VALUES = {1: 0.3, 2: 0.5, 3: None, 4: 0.5, 5: 0.1, 6: 0.4}  # of step 3 NaN; step 7 has no evaluation


def run_with(folder: Path, values: dict[int, Any], **more: Any) -> Path:
    for step in range(1, 8):
        checkpoint_path(folder, step).mkdir(parents=True)
    rows = [{"step": step, **({NAME: values[step]} if step in values else {}), **more} for step in range(1, 9)]
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def steps(run_dir: Path, best: Best | None, lines: list[str] | None = None) -> list[int]:
    told = [] if lines is None else lines
    return sorted(map(step_of, best_checkpoints(run_dir, checkpoint_path(run_dir, 7), best, told.append)))


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        (None, []),
        (Best(1, NAME, "max"), [4]),  # of equal ones the later
        (Best(3, NAME, "max"), [2, 4, 6]),
        (Best(2, NAME, "min"), [1, 5]),
        (Best(9, NAME, "max"), [1, 2, 4, 5, 6]),  # neither NaN nor none
    ],
)
def test_only_finite_values_of_a_checkpoints_own_step_count(tmp_path: Path, best: Best, expected: list[int]) -> None:
    assert steps(run_with(tmp_path, VALUES), best) == expected


def test_a_checkpoint_without_the_metric_is_told_with_the_name_that_may_be_meant(tmp_path: Path) -> None:
    run_dir, lines = run_with(tmp_path, VALUES | {7: None}), []
    steps(run_dir, Best(1, NAME, "max"), lines)
    (tmp_path / "other").mkdir()
    steps(run_with(tmp_path / "other", VALUES | {7: 0.2}), Best(1, "val/aime/maen@8", "max"), lines)
    shutil.rmtree(tmp_path / "other")
    steps(run_with(tmp_path / "other", VALUES), Best(1, NAME, "max"), lines)
    assert [line.partition("; ")[2] for line in lines] == [
        "its checkpoint is none of the best",
        "did you mean val/aime/mean@8?",
        "evaluate at the steps that are saved (eval.every)",
    ]


@pytest.mark.parametrize("damage", ["text", "missing", "no step"])
def test_rows_that_cannot_be_read_cost_no_checkpoint(tmp_path: Path, damage: str) -> None:
    run_dir, lines = run_with(tmp_path, VALUES), []
    path = run_dir / METRICS
    if damage == "missing":
        path.unlink()
    else:
        path.write_text({"text": "{\n", "no step": '{"a": 1}\n'}[damage] + path.read_text())
    assert steps(run_dir, Best(1, NAME, "max"), lines) == [1, 2, 3, 4, 5, 6, 7]
    assert len(lines) == 1 and "cannot tell the best checkpoints: none is deleted now" in lines[0]


def test_a_broken_last_line_and_values_that_are_no_numbers_do_not_count(tmp_path: Path) -> None:
    run_dir = run_with(tmp_path, {1: 0.3, 2: True, 4: "0.9", 5: 1e400})
    with (run_dir / METRICS).open("a") as file:
        file.write('{"step": 2, "val')
    assert steps(run_dir, Best(9, NAME, "max")) == [1]


def test_a_run_keeps_the_newest_and_the_best_and_another_metric_after_a_resume(tmp_path: Path) -> None:
    """Published as a run does. The second metric finds its best among what is left."""
    rows, kept = [], []
    for step, (first, second) in enumerate([(0.1, 1), (0.9, 2), (0.2, 9), (0.3, 3), (0.8, 4), (0.4, 5)], 1):
        rows.append(json.dumps({"step": step, NAME: first, "reward/mean": second}) + "\n")
        (tmp_path / METRICS).write_text("".join(rows))
        best = Best(1, NAME, "max") if step < 5 else Best(1, "reward/mean", "max")
        write_checkpoint(checkpoint_path(tmp_path, step), keep=2, best=best)
        kept.append([step_of(path) for path in all_checkpoints(tmp_path)])
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [3, 4, 5], [3, 5, 6]]
