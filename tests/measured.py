"""Benchmark results as a table on the screen and, in $DAPO_MCORE_BENCH_RESULTS, as JSON."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def report(name: str, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows, which have the same keys, and write them to NAME.json if the variable names a folder."""
    table = Table(title=title)
    for number, key in enumerate(rows[0]):
        table.add_column(key, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(f"{value:.5g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=140).print("\n", table)
    if folder := os.environ.get("DAPO_MCORE_BENCH_RESULTS"):
        Path(folder, f"{name}.json").write_text(json.dumps({"title": title, "rows": list(rows)}, indent=1) + "\n")


def cpu_s(action: Callable[[], Any], rounds: int = 1) -> float:
    """Return the CPU seconds of this process, all threads together, in the best of so many calls: others only add to it."""
    taken = []
    for _ in range(rounds):
        start = time.process_time()
        action()
        taken.append(time.process_time() - start)
    return min(taken)
