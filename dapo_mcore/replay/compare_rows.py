"""Compares the rows of two runs' metrics.jsonl, for runs without records.

Change here: which metrics a repeated run must repeat.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from dapo_mcore.observe.metrics import describe
from dapo_mcore.observe.sinks import read_metrics
from dapo_mcore.replay.compare import Check, Verdict

_OF_THE_MACHINE = ("time/", "perf/", "memory/")
_UNITS_OF_TIME = ("s", "GB/s")


def rows_of(run_dir: Path) -> dict[int, dict[str, float]]:
    """Return a run's rows by rollout step. Of several rows of a step the last one holds."""
    return {int(row["step"]): row for row in read_metrics(run_dir)}


def compare_rows(a: Mapping[str, float], b: Mapping[str, float]) -> Check:
    """Return the check of the metrics that both rows have, but for those that depend on the machine's speed and memory."""
    names = [name for name in a if name in b and name != "step" and _repeats(name)]
    differing = [name for name in names if not _same(a[name], b[name])]
    if not differing:
        return Check("metrics", Verdict.EQUAL, f"{len(names)} metrics")
    first = differing[0]
    values = [row[first] for row in (a, b)]
    detail = f"{first} {values[0]} against {values[1]}; {len(differing)} of {len(names)} metrics differ"
    return Check("metrics", Verdict.DIFFERS, detail, {"metric": first, "values": values, "differing": len(differing)})


def only_in_one(a: Mapping[str, float], b: Mapping[str, float]) -> list[str]:
    """Return the metrics that one of two rows lacks: an evaluation that only one of the runs has done, for instance."""
    return [name for name in (*a, *b) if (name in a) != (name in b) and _repeats(name)]


def _repeats(name: str) -> bool:
    metric = describe(name)
    return not name.startswith(_OF_THE_MACHINE) and (metric is None or metric.unit not in _UNITS_OF_TIME)


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))
