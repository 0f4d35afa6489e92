"""PNG plots of the policy head's benchmark, from the JSON that `pytest -m bench` writes: time and memory by tokens.

Change here: what the panels show. The file's format is defined in tests/kernels/bench/report.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from dapo_mcore.errors import DataError
from dapo_mcore.observe.plots import MARKERS, PALETTE, STYLE

RESULTS = Path("kernels/results")
ROOFLINE = {"color": "#222222", "linestyle": "--", "linewidth": 1.6, "label": "three GEMMs alone"}
Bench = dict[str, Any]
Shapes = list[dict[str, Any]]


def plot_benches(files: Sequence[Path], out: Path | None = None) -> list[Path]:
    """The PNGs written: beside each JSON file, or `out` for a single one. Without files, all of kernels/results.

    Raises DataError for a file that is not a benchmark's, and when there is none.
    """
    files = list(files) or sorted(RESULTS.glob("*.json"))
    if not files:
        raise DataError(f"no benchmark JSON in {RESULTS}; name one, or make one: see kernels/results/README.md")
    if out and len(files) > 1:
        raise DataError(f"--out {out} names one PNG, but there are {len(files)} files; leave it out or give one file")
    return [plot_bench(file, out or file.with_suffix(".png")) for file in files]


def plot_bench(file: Path, out: Path) -> Path:
    """The PNG `out` of one file: a column for each model and tensor-parallel size, time above memory if measured."""
    bench = read_bench(file)
    groups, styles = _groups(bench["shapes"]), _styles(bench["shapes"])
    draw = [_draw_time, _draw_memory] if _has_memory(bench["shapes"]) else [_draw_time]
    with matplotlib.rc_context(STYLE):
        size = (max(3.1 * len(groups), 10.5), 1.8 + 3.4 * len(draw))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(draw), len(groups), squeeze=False, sharex="col", sharey="row")
        for column, (title, shapes) in zip(grid.T, groups.items()):
            column[0].set_title(title)
            for axes, panel in zip(column, draw):
                panel(axes, shapes, styles)
            _set_token_axis(column[-1], shapes)
        for axes, label in zip(grid[:, 0], ("time / time of the three GEMMs", "peak beyond the inputs, GiB")):
            axes.set_ylabel(label)
        handles = [Line2D([], [], **ROOFLINE), *(Line2D([], [], label=name, **style) for name, style in styles.items())]
        columns = min(4, len(handles))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
        figure.suptitle(_heading(bench), fontsize=12, x=0.01, ha="left")
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=120, format="png")
    return out


def read_bench(file: Path) -> Bench:
    """The file's content. Raises DataError when it is not a benchmark with at least one shape."""
    try:
        bench = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is no benchmark JSON: {error}") from error
    if not isinstance(bench, dict) or not bench.get("shapes"):
        raise DataError(f"{file} holds no `shapes`: give a file that `pytest -m bench` wrote")
    return bench


def _groups(shapes: Shapes) -> dict[str, Shapes]:
    """{"model, TP n": its shapes by tokens}."""
    groups: dict[str, Shapes] = {}
    for shape in sorted(shapes, key=lambda shape: (shape["hidden"], shape["tensor_parallel"], shape["tokens"])):
        groups.setdefault(f"{shape['model']}, TP{shape['tensor_parallel']}", []).append(shape)
    return groups


def _has_memory(shapes: Shapes) -> bool:
    return any(row["peak_mib"] is not None for shape in shapes for row in shape["rows"])


def _styles(shapes: Shapes) -> dict[str, dict[str, Any]]:
    """A line style for each contender that was measured anywhere: ours thick and of one colour, told apart by marker."""
    names = dict.fromkeys(row["contender"] for shape in shapes for row in shape["rows"] if row["ms"])
    ours = [name for name in names if name.startswith("ours")]
    others = [name for name in names if name not in ours]
    common = {"markersize": 6, "markeredgecolor": "white"}
    styles = {
        name: {"color": PALETTE[0], "linewidth": 2.4, "marker": marker} for name, marker in zip(ours, cycle(MARKERS))
    }
    looks = zip(others, cycle(PALETTE[1:]), cycle(MARKERS))
    styles |= {name: {"color": colour, "linewidth": 1.2, "marker": marker} for name, colour, marker in looks}
    return {name: common | styles[name] for name in names}


def _points(shapes: Shapes, contender: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(tokens, row) where the contender was measured."""
    for shape in shapes:
        yield from ((shape["tokens"], row) for row in shape["rows"] if row["contender"] == contender and row["ms"])


def _draw_time(axes: Axes, shapes: Shapes, styles: dict[str, dict[str, Any]]) -> None:
    """Time over that of the three products, logarithmic, with the spread as bars; the products' own time in numbers."""
    floor = {shape["tokens"]: shape["gemms_ms"]["median"] for shape in shapes}
    axes.plot(list(floor), [1.0] * len(floor), **ROOFLINE)
    for tokens, ms in floor.items():
        axes.annotate(f"{ms:.3g} ms", (tokens, 1.0), (0, -13), textcoords="offset points", ha="center", fontsize=9)
    for name, style in styles.items():
        points = [(tokens, row["ms"]) for tokens, row in _points(shapes, name)]
        xs = [tokens for tokens, _ in points]
        low, middle, high = ([ms[q] / floor[tokens] for tokens, ms in points] for q in ("p20", "median", "p80"))
        axes.plot(xs, middle, **style)
        axes.vlines(xs, low, high, color=style["color"], linewidth=1.0)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.margins(y=0.12)


def _draw_memory(axes: Axes, shapes: Shapes, styles: dict[str, dict[str, Any]]) -> None:
    for name, style in styles.items():
        points = [(tokens, row["peak_mib"] / 1024) for tokens, row in _points(shapes, name)]
        axes.plot([tokens for tokens, _ in points], [gib for _, gib in points], **style)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _set_token_axis(axes: Axes, shapes: Shapes) -> None:
    tokens = [shape["tokens"] for shape in shapes]
    axes.set_xscale("log")
    axes.set_xlim(tokens[0] / 1.6, tokens[-1] * 1.6)
    axes.xaxis.set_major_locator(FixedLocator(tokens))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("loss tokens")


def _heading(bench: Bench) -> str:
    versions = ", ".join(
        f"{name} {bench['versions'][name]}" for name in ("torch", "triton") if bench["versions"].get(name)
    )
    return f"Policy head on {bench['machine']}: {bench['date'][:10]}, commit {bench['commit']}, {versions}"
