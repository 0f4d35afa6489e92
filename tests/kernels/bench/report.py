"""Results of the benchmark: a JSON file, written again after every shape, and tables.

Change here: the columns, and the format of the file, which dapo_mcore/observe/bench_plots.py reads.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.markup import escape
from rich.table import Table

from tests.kernels.bench.measure import Timing
from tests.kernels.bench.passes import Pass
from tests.kernels.bench.problem import Shape

RESULTS_VARIABLE = "DAPO_MCORE_BENCH_RESULTS"
COMMIT_VARIABLE = "DAPO_MCORE_BENCH_COMMIT"
PACKAGES = ("torch", "triton", "liger-kernel", "liger-cute-kernels", "verl", "cut-cross-entropy", "fla-core")
UNITS = {
    "ms": "median, p20 and p80 of forward and backward together, milliseconds",
    "peak_mib": "device memory beyond the inputs and main_grad, results included, MiB",
    "gemms_ms": "logits, gradient to hidden and to weight by the vendor's library alone, milliseconds",
    "errors": "against fp64 on the check shape: ‖Δ‖₂/‖exact‖₂ of the gradients, worst_token of one row of hidden's",
    "gb_s": "bytes requested by a call / its median time, 1e9 bytes per second",
}


@dataclass(frozen=True, slots=True)
class Errors:
    grad_hidden: float
    grad_weight: float
    worst_token: float


@dataclass(frozen=True, slots=True)
class Row:
    """Measurement of a contender on a shape, or the reason why there is none."""

    contender: str
    ms: Timing | None = None
    peak_mib: float | None = None
    errors: Errors | None = None
    failure: str | None = None


class Report:
    """Results of shapes and passes, kept in the file `path`.

    A file of the same machine, commit and versions is extended, so that a long benchmark can run in parts; a shape that is
    measured again replaces its old result. Any other file is replaced.
    """

    def __init__(self, path: Path, device: torch.device, copy_gb_s: float) -> None:
        self.path, self.copy_gb_s = path, copy_gb_s
        header = {
            "machine": machine_name(device),
            "commit": git_commit(),
            "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **_versions()},
        }
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        same = all(before.get(key) == value for key, value in header.items())
        self._shapes = {shape["name"]: shape for shape in before["shapes"]} if same else {}
        self._passes = {p["name"]: p for p in before["passes"]} if same else {}
        date = datetime.now(UTC).isoformat(timespec="seconds")
        self._header = header | {"date": date, "units": UNITS, "copy_gb_s": copy_gb_s}

    def add_shape(self, shape: Shape, gemms: Timing, rows: Iterable[Row]) -> None:
        measured = {"gemms_ms": gemms._asdict(), "rows": [_plain(row) for row in rows]}
        self._shapes[str(shape)] = {"name": str(shape), **asdict(shape), **measured}
        self._write()

    def add_passes(self, passes: Iterable[Pass]) -> None:
        for p in passes:
            self._passes[p.name] = {"name": p.name, "ms": p.timing._asdict(), "gb_s": p.gb_s}
        self._write()

    def _write(self) -> None:
        content = self._header | {"shapes": [*self._shapes.values()], "passes": [*self._passes.values()]}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def shape_table(shape: Shape, gemms: Timing, rows: Sequence[Row]) -> Table:
    title = f"{shape}: H {shape.hidden}, V {shape.vocab}; three GEMMs {gemms.median:.4g} ms"
    table = Table(title=title, title_justify="left")
    table.add_column("forward and backward")
    for heading in ("ms", "p20-p80", "of GEMMs", "peak MiB", "error dX", "worst token", "error dW"):
        table.add_column(heading, justify="right", no_wrap=True)
    if any(row.failure for row in rows):
        table.add_column("failure", no_wrap=True, style="red")
    for row in rows:
        table.add_row(row.contender, *_cells(row, gemms))
    return table


def pass_table(passes: Iterable[Pass], copy_gb_s: float) -> Table:
    table = Table(title=f"memory-bound; device copy {copy_gb_s:.4g} GB/s", title_justify="left")
    table.add_column("pass")
    for heading in ("ms", "p20-p80", "GB/s", "of copy"):
        table.add_column(heading, justify="right", no_wrap=True)
    for p in passes:
        table.add_row(p.name, *_time(p.timing), f"{p.gb_s:.4g}", f"{p.gb_s / copy_gb_s:.0%}")
    return table


def results_file(device: torch.device, fallback: Path) -> Path:
    """Return the path <machine>-<date>.json in the folder $DAPO_MCORE_BENCH_RESULTS, or in `fallback` if it is not set."""
    folder = Path(os.environ.get(RESULTS_VARIABLE) or fallback)
    return folder / f"{machine_name(device)}-{datetime.now(UTC):%Y-%m-%d}.json"


def machine_name(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}"
    return name.lower().replace(" ", "-")


def git_commit() -> str:
    """Return $DAPO_MCORE_BENCH_COMMIT (for a tree without its .git), or the commit, with -dirty if files were changed."""
    if given := os.environ.get(COMMIT_VARIABLE):
        return given
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def _versions() -> dict[str, str | None]:
    return {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _plain(row: Row) -> dict:
    return asdict(row) | {"ms": row.ms and row.ms._asdict()}


def _cells(row: Row, gemms: Timing) -> list[str]:
    e = row.errors
    errors = [f"{x:.1e}" for x in (e.grad_hidden, e.worst_token, e.grad_weight)] if e else [""] * 3
    if row.ms is None:
        return ["[red]failed[/]", "", "", "", *errors, escape(row.failure or "")]
    peak = "-" if row.peak_mib is None else f"{row.peak_mib:,.0f}"
    return [*_time(row.ms), f"{row.ms.median / gemms.median:.0%}", peak, *errors]


def _time(timing: Timing) -> tuple[str, str]:
    return f"{timing.median:.4g}", f"{timing.p20:.4g}-{timing.p80:.4g}"
