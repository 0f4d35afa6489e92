"""Which checkpoints are the best by a metric of their own rollout steps. Rank 0's work, in the process that publishes.

Change here: what makes one better than another. The metrics are those in the run's metrics.jsonl, so a run that resumes with another
metric judges its old checkpoints by it. Nothing imports torch (see saver.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dapo_mcore.checkpoint.run_folder import all_checkpoints, step_of

METRICS = "metrics.jsonl"


class Best(NamedTuple):
    """Which checkpoints are kept beside the newest: checkpoint.keep_best, best_metric, best_mode."""

    keep: int
    metric: str
    mode: Literal["max", "min"]


def best_checkpoints(run_dir: Path, newest: Path, best: Best | None, warn: Callable[[str], None]) -> set[Path]:
    """Return those of the run's whole checkpoints that are kept because they are the best, at most `best.keep`.

    A checkpoint whose row has no such metric, or one that is not finite (null), is none of them. Of equal ones the later is better.
    `warn` is told if `newest` has none, and if the rows cannot be read: then all checkpoints are returned, so that none is lost.
    """
    if best is None:
        return set()
    checkpoints = all_checkpoints(run_dir)
    try:
        rows = _rows(run_dir / METRICS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        warn(
            f"warning: {run_dir / METRICS} cannot be read ({error}), so checkpoint.keep_best cannot tell the best checkpoints: none is "
            "deleted now"
        )
        return set(checkpoints)
    if _value(rows, newest, best.metric) is None:
        warn(_missing(rows.get(step_of(newest), {}), step_of(newest), best.metric))
    sign = 1 if best.mode == "max" else -1
    found = [(sign * value, path) for path in checkpoints if (value := _value(rows, path, best.metric)) is not None]
    found.sort(key=lambda one: (one[0], step_of(one[1])), reverse=True)
    return {path for _, path in found[: best.keep]}


def _rows(path: Path) -> dict[int, dict[str, Any]]:
    """Return the metrics of each step; a broken last line, of a killed run, is left out. Raise ValueError for another."""
    lines, rows = path.read_bytes().splitlines(), {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows[row["step"]] = row
        except ValueError:
            if number < len(lines):
                raise ValueError(f"line {number} is not JSON") from None
    return rows


def _value(rows: dict[int, dict[str, Any]], path: Path, metric: str) -> float | None:
    value = rows.get(step_of(path), {}).get(metric)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def _missing(row: dict[str, Any], step: int, metric: str) -> str:
    if metric in row:
        return f"warning: checkpoint.best_metric {metric} of rollout step {step} is not finite; its checkpoint is none of the best"
    near = get_close_matches(metric, row, 1)
    hint = f"did you mean {near[0]}?" if near else "evaluate at the steps that are saved (eval.every)"
    return f"warning: rollout step {step} has no metric {metric} (checkpoint.best_metric), so its checkpoint is none of the best; {hint}"
