"""PNG plots of the policy head's benchmark, from the JSON that `pytest -m bench` writes: time and memory by tokens, or
time against memory for a single number of tokens.

Change here: what the panels show. tests/kernels/bench/report.py defines the file's format.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from dapo_mcore.errors import DataError
from dapo_mcore.observe.plots import MARKERS, PALETTE, STYLE

RESULTS = Path("kernels/results")
COLOURS = (*PALETTE, "#882255", "#44AA99", "#999933", "#332288", "#CC6677", "#117733", "#AA4499", "#777777")
"""One per contender: Okabe and Ito's colours, then Tol's muted ones."""
ROOFLINE = {"color": "#222222", "linestyle": "--", "linewidth": 1.6, "label": "three GEMMs alone"}
_SIDES = (
    ("left", 0),
    ("right", 0),
    ("left", 1),
    ("right", 1),
    ("left", -1),
    ("right", -1),
    ("center", 1),
    ("center", -1),
)
_DISTANCES = (14, 24, 36, 50)
"""Distances in points between a point of the chart and the middle of its name, nearest first."""
Bench = dict[str, Any]
Shapes = list[dict[str, Any]]


def plot_benches(files: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Write a PNG beside each JSON file (or `out` for a single file) and return the PNGs. No files: all kernels/results.

    Raise DataError for a file that is not a benchmark's, and if there is none.
    """
    files = list(files) or sorted(RESULTS.glob("*.json"))
    if not files:
        raise DataError(f"no benchmark JSON in {RESULTS}; name one, or make one: see kernels/results/README.md")
    if out and len(files) > 1:
        raise DataError(f"--out {out} names one PNG, but there are {len(files)} files; leave it out or give one file")
    return [plot_bench(file, out or file.with_suffix(".png")) for file in files]


def plot_bench(file: Path, out: Path) -> Path:
    """Write the PNG `out` of one file and return `out`."""
    bench = read_bench(file)
    with matplotlib.rc_context(STYLE):
        figure = draw_bench(bench)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=figure.dpi, format="png")
    return out


def draw_bench(bench: Bench) -> Figure:
    """Return the figure of a benchmark, with a column per model and tensor-parallel size.

    It shows time and, if measured, memory by tokens; if every column has a single number of tokens, time against memory.
    """
    groups, styles = _groups(bench["shapes"]), _styles(bench["shapes"])
    one_size = all(len(shapes) == 1 and _has_memory(shapes) for shapes in groups.values())
    figure = (_trade_off if one_size else _by_tokens)(groups, styles)
    figure.suptitle(_heading(bench), fontsize=12, x=0.01, ha="left")
    if one_size:
        _label_points(figure)
    return figure


def _by_tokens(groups: dict[str, Shapes], styles: dict[str, dict[str, Any]]) -> Figure:
    draw = [_draw_time, _draw_memory] if any(map(_has_memory, groups.values())) else [_draw_time]
    figure = Figure(figsize=(max(3.1 * len(groups), 10.5), 1.8 + 3.4 * len(draw)), dpi=120, layout="constrained")
    grid = figure.subplots(len(draw), len(groups), squeeze=False, sharex="col", sharey="row")
    for column, (title, shapes) in zip(grid.T, groups.items()):
        column[0].set_title(title)
        for axes, panel in zip(column, draw):
            panel(axes, shapes, styles)
        _set_token_axis(column[-1], shapes)
    for axes, label in zip(grid[:, 0], ("time / time of the three GEMMs", "peak beyond the inputs, GiB")):
        axes.set_ylabel(label)
    handles = [Line2D([], [], **ROOFLINE), *(Line2D([], [], label=name, **style) for name, style in styles.items())]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False)
    return figure


def _trade_off(groups: dict[str, Shapes], styles: dict[str, dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(max(7.0 * len(groups), 10.5), 6.4), dpi=120, layout="constrained")
    for axes, (title, (shape,)) in zip(figure.subplots(1, len(groups), squeeze=False).flat, groups.items()):
        axes.set_title(f"{title}, {shape['tokens']:,} loss tokens: lower and further left is better")
        _draw_trade_off(axes, shape, styles)
    return figure


def read_bench(file: Path) -> Bench:
    """Return the file's content. Raise DataError if it is not a benchmark with at least one shape."""
    try:
        bench = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is no benchmark JSON: {error}") from error
    if not isinstance(bench, dict) or not bench.get("shapes"):
        raise DataError(f"{file} holds no `shapes`: give a file that `pytest -m bench` wrote")
    return bench


def _groups(shapes: Shapes) -> dict[str, Shapes]:
    """Return {"model, TP n": its shapes, by tokens}."""
    groups: dict[str, Shapes] = {}
    for shape in sorted(shapes, key=lambda shape: (shape["hidden"], shape["tensor_parallel"], shape["tokens"])):
        groups.setdefault(f"{shape['model']}, TP{shape['tensor_parallel']}", []).append(shape)
    return groups


def _has_memory(shapes: Shapes) -> bool:
    return any(row["peak_mib"] is not None for shape in shapes for row in shape["rows"])


def _styles(shapes: Shapes) -> dict[str, dict[str, Any]]:
    """Return a line style for each contender that was measured: a different colour each, ours with a thick line."""
    names = dict.fromkeys(row["contender"] for shape in shapes for row in shape["rows"] if row["ms"])
    looks = zip(names, cycle(COLOURS), cycle(MARKERS))
    common = {"markersize": 6, "markeredgecolor": "white"}
    return {
        name: {**common, "color": colour, "marker": marker, "linewidth": 2.4 if _is_ours(name) else 1.2}
        for name, colour, marker in looks
    }


def _is_ours(contender: str) -> bool:
    return contender.startswith("ours")


def _points(shapes: Shapes, contender: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (tokens, row) for each shape for which the contender was measured."""
    for shape in shapes:
        yield from ((shape["tokens"], row) for row in shape["rows"] if row["contender"] == contender and row["ms"])


def _draw_time(axes: Axes, shapes: Shapes, styles: dict[str, dict[str, Any]]) -> None:
    """Draw time / time of the three GEMMs on a log scale, with the spread as bars and the GEMMs' time in numbers."""
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
    _set_log(axes.yaxis, (1, 1.5, 2, 3, 5, 7), "x")
    axes.margins(y=0.12)


def _draw_memory(axes: Axes, shapes: Shapes, styles: dict[str, dict[str, Any]]) -> None:
    for name, style in styles.items():
        points = [(tokens, row["peak_mib"] / 1024) for tokens, row in _points(shapes, name)]
        axes.plot([tokens for tokens, _ in points], [gib for _, gib in points], **style)
    _set_log(axes.yaxis, (1, 2, 5))


def _draw_trade_off(axes: Axes, shape: dict[str, Any], styles: dict[str, dict[str, Any]]) -> None:
    """Draw time / time of the three GEMMs against peak memory, a named point per contender. A line joins ours."""
    floor = shape["gemms_ms"]["median"]
    rows = [row for row in shape["rows"] if row["ms"] and row["peak_mib"]]
    places = {row["contender"]: (row["peak_mib"] / 1024, row["ms"]["median"] / floor) for row in rows}
    axes.axhline(1.0, **{**ROOFLINE, "label": None}, zorder=0)
    ours = sorted(place for name, place in places.items() if _is_ours(name))
    axes.plot(*zip(*ours) if ours else ((), ()), color=PALETTE[0], linewidth=2.4, alpha=0.5, zorder=1)
    for row in rows:
        name, (x, y) = row["contender"], places[row["contender"]]
        colour = PALETTE[0] if _is_ours(name) else "#444444"
        axes.vlines(x, row["ms"]["p20"] / floor, row["ms"]["p80"] / floor, color=colour, linewidth=1.0)
        axes.plot(x, y, **{**styles[name], "color": colour, "markersize": 8}, linestyle="")
        axes.annotate(f"{name}, {row['ms']['median']:.3g} ms", (x, y), (0, 0), textcoords="offset points", color=colour)
    axes.annotate(
        f"three GEMMs alone, {floor:.3g} ms",
        (1.0, 1.0),
        (-4, -4),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=9,
    )
    _set_log(axes.yaxis, (1, 1.5, 2, 3, 5, 7), "x")
    _set_log(axes.xaxis, (1, 2, 5))
    axes.margins(x=0.2, y=0.2)
    axes.set(xlabel="peak beyond the inputs, GiB", ylabel="time / time of the three GEMMs")


def _label_points(figure: Figure) -> None:
    """Move each point's name to the nearest position at which it hides no other name, point, bar or roofline."""
    figure.draw_without_rendering()
    for axes in figure.axes:
        labels = [text for text in axes.texts if text.xycoords == "data"]
        bars = [bar for collection in axes.collections for bar in collection.get_segments()]
        roofline = [(axes.get_xlim()[0], 1.0), (axes.get_xlim()[1], 1.0)]
        taken = [Bbox(axes.transData.transform(ends)).padded(3) for ends in (*bars, roofline)]
        taken += [text.get_window_extent() for text in axes.texts if text not in labels]
        taken += [Bbox([xy, xy]).padded(8) for xy in axes.transData.transform([label.xy for label in labels])]
        for label in labels:
            taken.append(_place(label, axes.bbox, taken))


def _place(label: Annotation, inside: Bbox, taken: Sequence[Bbox]) -> Bbox:
    """Move a name and return its box. If no position is free, use the last one."""
    box = label.get_window_extent()
    for distance, (side, height) in product(_DISTANCES, _SIDES):
        label.set(ha=side, va="center", position=({"left": 9, "right": -9, "center": 0}[side], height * distance))
        box = label.get_window_extent()
        within = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
        if within and not box.count_overlaps(taken):
            break
    return box


def _set_log(axis: Axis, ticks: tuple[float, ...], unit: str = "") -> None:
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{unit}"))
    axis.set_minor_locator(NullLocator())


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
