"""PNG plots of the policy head's benchmark, from the JSON that `pytest -m bench` writes: time against memory for one or two
shapes, otherwise time and memory by tokens.

    dapo-mcore plot --bench kernels/results/nvidia-h100-80gb-hbm3-2026-11-27.json

Change here: what the panels show. tests/kernels/bench/report.py defines the file's format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import cycle, pairwise, product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
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
MOST_TRADE_OFFS = 2
"""Shapes that are drawn as time against memory, a panel each."""
EXACT = 0.01
"""Largest error of any token's gradient, relative to it, of a contender with a filled marker."""
_SIZE = re.compile(r"(.+), (\d+ GB)")
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
_DISTANCES = (14, 24, 36, 50, 66)
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
    """Return the figure of a benchmark.

    One or two shapes with measured memory are drawn as time against memory. Otherwise there is a column per model and
    tensor-parallel size, with time and, if measured, memory by tokens.
    """
    shapes = bench["shapes"]
    trade_off = len(shapes) <= MOST_TRADE_OFFS and all(_has_memory([shape]) for shape in shapes)
    figure = (_trade_off if trade_off else _by_tokens)(_groups(shapes), _styles(shapes))
    figure.suptitle(_heading(bench), fontsize=12, x=0.01, ha="left")
    if trade_off:
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
    panels = [(title, shape) for title, shapes in groups.items() for shape in shapes]
    figure = Figure(figsize=(10.5, 0.4 + 6.0 * len(panels)), dpi=120, layout="constrained")
    for axes, (title, shape) in zip(figure.subplots(len(panels), squeeze=False).flat, panels):
        axes.set_title(f"{title}, {shape['tokens']:,} loss tokens")
        _draw_trade_off(axes, shape, styles)
    figure.supxlabel(
        f"Lower and further left is better. Filled: the gradient of every token is within {EXACT:.0%} of fp64; hollow: not.",
        fontsize=10,
    )
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
    """Draw time / time of the three GEMMs against peak memory, a named point per contender.

    A line joins the points of one contender that differ in their workspace; only its largest one carries the whole name.
    """
    floor = shape["gemms_ms"]["median"]
    rows = [row for row in shape["rows"] if row["ms"] and row["peak_mib"]]
    axes.axhline(1.0, color="#222222", linewidth=1.2, zorder=0)
    families: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        name, x, y = row["contender"], row["peak_mib"] / 1024, row["ms"]["median"] / floor
        family, size = _SIZE.fullmatch(name).groups() if _SIZE.fullmatch(name) else (name, "")
        colour = PALETTE[0] if _is_ours(name) else "#444444"
        axes.vlines(x, row["ms"]["p20"] / floor, row["ms"]["p80"] / floor, color=colour, linewidth=1.0)
        axes.plot(x, y, **_marker(row, styles[name], colour), linestyle="")
        label = f"{size if size and family in families else name}, {_milliseconds(row['ms']['median'])}"
        axes.annotate(label, (x, y), (0, 0), textcoords="offset points", color=colour)
        families.setdefault(family, []).append((x, y))
    for points in families.values():
        if len(points) > 1:
            axes.plot(*zip(*sorted(points)), color=PALETTE[0], linewidth=2.4, alpha=0.5, zorder=1)
    axes.annotate(
        f"three GEMMs alone, {_milliseconds(floor)}",
        (0.0, 1.0),
        (4, -4),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        va="top",
        fontsize=9,
    )
    _set_log(axes.yaxis, (1, 1.5, 2, 3, 5, 7), "x")
    _set_log(axes.xaxis, (1, 2, 5))
    axes.margins(x=0.22, y=0.2)
    axes.set(xlabel="peak beyond the inputs, GiB", ylabel="time / time of the three GEMMs")


def _milliseconds(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _marker(row: dict[str, Any], style: dict[str, Any], colour: str) -> dict[str, Any]:
    exact = row["errors"] is not None and row["errors"]["worst_token"] <= EXACT
    face = colour if exact else "white"
    edge = "white" if exact else colour
    return {**style, "color": colour, "markersize": 8, "markerfacecolor": face, "markeredgecolor": edge}


def _label_points(figure: Figure) -> None:
    """Move each point's name to the nearest position at which it hides no other name, point, bar or line."""
    figure.draw_without_rendering()
    for axes in figure.axes:
        labels = [text for text in axes.texts if text.xycoords == "data"]
        bars = [axes.transData.transform(bar) for collection in axes.collections for bar in collection.get_segments()]
        taken = [Bbox(ends).padded(3) for ends in (*bars, *_line_pieces(axes))]
        points = axes.transData.transform([label.xy for label in labels])
        taken += [Bbox([xy, xy]).padded(8) for xy in points]
        names = [text.get_window_extent() for text in axes.texts if text not in labels]
        distances = np.linalg.norm(points[:, None] - points[None], axis=2)
        for number in np.sort(distances, axis=1)[:, 1:3].sum(1).argsort():  # where it is most crowded first
            _place(labels[number], taken, names)


def _line_pieces(axes: Axes) -> Iterator[tuple[Any, Any]]:
    """Yield the two ends in pixels of short pieces of each line."""
    for line in axes.lines:
        for start, end in pairwise(line.get_transform().transform(line.get_xydata())):
            yield from _pieces(start, end)


def _pieces(start: Any, end: Any, number: int = 24) -> Iterator[tuple[Any, Any]]:
    """Yield the ends of pieces of a slanted line: the box of the whole would hold much free space."""
    return pairwise([start + (end - start) * step / number for step in range(number + 1)])


def _place(label: Annotation, taken: list[Bbox], names: list[Bbox]) -> None:
    """Move a name to the position at which it and its leader hide least, the nearest of these.

    A leader joins a distant name and its point. Add the name's box to `names`, and the leader's boxes to `taken`.
    """

    def hidden(position: tuple[int, tuple[str, int]]) -> float:
        box, leader = _move(label, *position)
        inside = label.axes.bbox.padded(-1)
        outside = not (inside.x0 < box.x0 and box.x1 < inside.x1 and inside.y0 < box.y0 and box.y1 < inside.y1)
        return 1000 * outside + box.count_overlaps(taken + names) + sum(name.count_overlaps(leader) for name in names)

    distance, (side, height) = min(product(_DISTANCES, _SIDES), key=hidden)
    box, leader = _move(label, distance, (side, height))
    if leader:
        gap = {"shrinkA": 8 if side == "center" else 2, "shrinkB": 6}
        look = {"arrowstyle": "-", "color": label.get_color(), "linewidth": 0.7, **gap}
        label.axes.annotate("", label.xy, label.get_position(), textcoords="offset points", arrowprops=look)
    names.append(box)
    taken.extend(leader)


def _move(label: Annotation, distance: int, way: tuple[str, int]) -> tuple[Bbox, list[Bbox]]:
    """Move a name and return its box and those of its leader, if it needs one."""
    side, height = way
    label.set(ha=side, va="center", position=({"left": 9, "right": -9, "center": 0}[side], height * distance))
    box, point = label.get_window_extent(), label.axes.transData.transform(label.xy)
    if not height or distance == _DISTANCES[0]:
        return box, []
    anchor = {"left": box.x0, "right": box.x1, "center": point[0]}[side], box.y1 if height < 0 else box.y0
    return box, [Bbox(ends) for ends in _pieces(point, np.array(anchor))]


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
