"""PNG plots of runs from their metrics.jsonl: eight panels on one page, for one run or several compared.

Change here: which metrics a panel shows, and how the page looks (PANELS, STYLE).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from dapo_mcore.errors import DataError
from dapo_mcore.observe.sinks import METRICS_FILE, read_metrics

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, distinct with all common forms of colour blindness."""
MARKERS = ("o", "s", "^", "D", "v")
SMOOTH_FROM = 30
"""Number of steps from which on a curve is a thin line under its moving average over a tenth of the run."""
STYLE = {
    "font.size": 10.5,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": True,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "legend.fontsize": 9.5,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}

Run = list[dict[str, float]]


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric of a panel. `twin` draws it on the right-hand axis, dashed."""

    metric: str
    label: str
    twin: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One of the eight plots. A comparison of runs shows only the first curve, with `alone` as the axis label.

    note       text under the title.
    val        add markers for every `val/<set>/mean@k`.
    floor      make the axis logarithmic; smaller values, also zero, are drawn at the floor.
    fraction   limit the axis (the right-hand one, if there is one) to 0…1.
    histogram  shade the shares in the metrics of this pattern, one per decade of the axis.
    """

    title: str
    unit: str
    curves: tuple[Curve, ...]
    alone: str = ""
    twin_unit: str = ""
    note: str = ""
    val: bool = False
    floor: float = 0.0
    fraction: bool = False
    histogram: str = ""


PANELS = (
    Panel(
        "Loss",
        "policy loss",
        (Curve("actor/loss", "policy"), Curve("critic/vf_loss", "critic", twin=True)),
        twin_unit="value loss",
    ),
    Panel("Entropy", "nats per token", (Curve("actor/entropy", "entropy"),)),
    Panel(
        "Reward",
        "reward per sample",
        (Curve("reward/mean", "reward"), Curve("reward/score_mean", "without overlong penalty")),
        alone="reward per sample, with penalty",
    ),
    Panel(
        "Dynamic sampling",
        "fraction",
        (Curve("sampling/kept_ratio", "groups that vary"), Curve("sampling/resample_rate", "responses resampled")),
        alone="groups kept (fraction)",
        fraction=True,
    ),
    Panel(
        "Response length",
        "tokens",
        (
            Curve("response_length/mean", "mean"),
            Curve("response_length/clip_ratio", "truncated", twin=True),
            Curve("response_length/policy_mean", "without tool output"),
        ),
        alone="mean tokens",
        twin_unit="truncated fraction",
        fraction=True,
    ),
    Panel("Accuracy", "fraction correct", (Curve("reward/acc", "train"),), val=True, fraction=True),
    Panel(
        "Gradient norm",
        "norm before clipping",
        (Curve("actor/grad_norm", "policy"), Curve("critic/grad_norm", "critic")),
        alone="policy's norm before clipping",
    ),
    Panel(
        "Trainer/rollout mismatch",
        "|Δ log-prob|, nats per token",
        (
            Curve("mismatch/logprob_diff_mean", "mean"),
            Curve("mismatch/logprob_diff_p99", "p99"),
            Curve("mismatch/logprob_diff_max", "max"),
            Curve("mismatch/k3_kl", "k3 KL"),
        ),
        alone="mean |Δ log-prob|, nats",
        note="|log-prob by trainer - by rollout engine|:\n"
        "0 is perfect; rounding: mean < 1e-5 in fp32,\n"
        "~ 1e-2 in bf16; older samples add to it",
        floor=1e-8,
        histogram="mismatch/from_<size>",
    ),
)


def plot_run(run_dir: Path, out: Path | None = None) -> Path:
    """Write and return `out`, or plot.png in the run's folder. Raise DataError if the run has no step yet."""
    run_dir = Path(run_dir)
    return plot_runs([run_dir], out or run_dir / "plot.png")


def plot_runs(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write and return `out`. Several runs share each panel, one colour each, with the panel's first curve."""
    runs = {name: _read_steps(folder) for name, folder in zip(_names(run_dirs), run_dirs)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(15.5, 7.2), layout="constrained")
        figure.get_layout_engine().set(wspace=0.04, hspace=0.05)
        for axes, panel in zip(figure.subplots(2, 4).flat, PANELS):
            draw_panel(axes, panel, runs)
        _write_heading(figure, runs)
        out = Path(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=120, format="png")
    return out


def smooth(values: np.ndarray) -> np.ndarray:
    """Return float64 [N], the centred moving average over a tenth of the run. NaN is ignored, and stays NaN."""
    window = np.ones(max(3, len(values) // 10 | 1))
    known = np.isfinite(values)
    sums = np.convolve(np.where(known, values, 0.0), window, mode="same")
    counts = np.convolve(known.astype(np.float64), window, mode="same")
    return np.where(known, sums / np.maximum(counts, 1.0), np.nan)


def _read_steps(run_dir: Path) -> Run:
    run = read_metrics(run_dir)
    if not any(record["step"] for record in run):
        raise DataError(
            f"{METRICS_FILE} in {run_dir} has 0 rollout steps, and a plot needs at least 1; wait for the run's first step, or "
            f"leave the run out"
        )
    return run


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """Return the folder names, or the whole paths if two names are equal."""
    names = [Path(folder).resolve().name for folder in run_dirs]
    return names if len(set(names)) == len(names) else [str(folder) for folder in run_dirs]


def draw_panel(axes: Axes, panel: Panel, runs: dict[str, Run]) -> None:
    """Draw one panel of the page, for one run or for several, by their names in the legend."""
    axes.set_title(panel.title, pad=6 + 10.5 * len(panel.note.splitlines()))
    if panel.note:
        note = axes.text(0, 1.02, panel.note, transform=axes.transAxes, fontsize=8, color="#666666", linespacing=1.15)
        note.set_in_layout(False)  # it may extend beyond the panel's right edge
    axes.set_ylabel(panel.unit)
    axes.set_xlabel("rollout step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    drawn = _draw_one_run(axes, panel, *runs.values()) if len(runs) == 1 else _draw_comparison(axes, panel, runs)
    if not drawn:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", color="#888888")
        axes.set(xticks=[], yticks=[])
        return
    last = max((record["step"] for run in runs.values() for record in run), default=0)
    axes.set_xlim(-0.02 * last, 1.02 * last + (last < 2))
    if panel.floor:
        _set_log_scale(axes, panel.floor)
    if panel.fraction and not panel.twin_unit:
        axes.set_ylim(-0.03, 1.03)


def _draw_one_run(axes: Axes, panel: Panel, run: Run) -> bool:
    """Draw the panel and return True if it has any data."""
    handles = []
    for curve, colour in zip(panel.curves, PALETTE):
        if _series(run, curve.metric) is None:
            continue
        target = _twin(axes, panel, colour) if curve.twin else axes
        _draw_curve(target, run, curve.metric, colour, dashed=curve.twin, floor=panel.floor)
        handles.append(Line2D([], [], color=colour, linestyle="--" if curve.twin else "-", label=curve.label))
    if panel.val:
        handles += _draw_val(axes, run, PALETTE[1:])
    if panel.histogram:
        handles += _draw_histogram(axes, run, panel.histogram.partition("<")[0])
    if handles and (len(panel.curves) > 1 or panel.val):
        wide = {"loc": "upper center", "ncols": 3, "columnspacing": 0.8, "handlelength": 1.2}
        axes.legend(handles=handles, **(wide if len(handles) > 3 else {"loc": "best"}))
    return bool(handles)


def _draw_comparison(axes: Axes, panel: Panel, runs: dict[str, Run]) -> bool:
    drawn = False
    for colour, run in zip(_colours(len(runs)), runs.values()):
        drawn |= _draw_curve(axes, run, panel.curves[0].metric, colour, floor=panel.floor)
        if panel.val:
            drawn |= bool(_draw_val(axes, run, (colour,)))
    axes.set_ylabel(panel.alone or panel.unit)
    if panel.val and drawn:
        _explain_markers(axes)
    return drawn


def _draw_curve(axes: Axes, run: Run, metric: str, colour: str, dashed: bool = False, floor: float = 0.0) -> bool:
    series = _series(run, metric)
    if series is None:
        return False
    steps, values = series[0], np.maximum(series[1], floor) if floor else series[1]
    line = "--" if dashed else "-"
    marker = "." if len(steps) < SMOOTH_FROM // 2 else None
    if len(steps) < SMOOTH_FROM:
        axes.plot(steps, values, color=colour, linewidth=1.8, linestyle=line, marker=marker, markersize=7)
    else:
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
        axes.plot(steps, smooth(values), color=colour, linewidth=2.0, linestyle=line)
    return True


def _draw_val(axes: Axes, run: Run, colours: Sequence[str]) -> list[Line2D]:
    """Draw mean@k of every validation set with markers. Return the lines."""
    names = dict.fromkeys(name for record in run for name in record if name.startswith("val/") and "/mean@" in name)
    lines = []
    for index, name in enumerate(names):
        steps, values = _series(run, name) or ((), ())
        style = {"color": colours[index % len(colours)], "marker": MARKERS[index % len(MARKERS)]}
        label = name.removeprefix("val/").replace("/", " ")
        lines += axes.plot(steps, values, linewidth=1.2, markersize=5, markeredgecolor="white", label=label, **style)
    return lines


def _draw_histogram(axes: Axes, run: Run, prefix: str) -> list[Patch]:
    """Shade each step's column by the share of tokens in each decade. Return the legend's entry, [] without data.

    `<prefix>1e-3` is the share from 1e-3 to 1e-2. `<prefix>0`, below the first decade, is drawn as one decade more.
    """
    rows = [record for record in run if f"{prefix}0" in record]
    names = sorted(({name for record in rows for name in record if name.startswith(prefix)}), key=_decade_of(prefix))
    shares = np.array([[record[name] for record in rows] for name in names])
    filled = np.flatnonzero(shares.sum(1) > 0) if rows else ()
    if len(filled) == 0:
        return []
    first, last = filled[0], filled[-1] + 1
    lowest = _decade_of(prefix)(names[1]) - 1
    sizes = 10.0 ** np.arange(lowest + first, lowest + last + 1)
    steps = np.array([record["step"] for record in rows])
    edges = np.concatenate([steps[:1] - 0.5, (steps[1:] + steps[:-1]) / 2, steps[-1:] + 0.5])
    axes.pcolormesh(edges, sizes, shares[first:last], cmap="Greys", vmin=0, vmax=1.6, zorder=0, rasterized=True)
    return [Patch(color="#999999", label="token share")]


def _decade_of(prefix: str) -> Callable[[str], float]:
    return lambda name: math.log10(float(name.removeprefix(prefix)) or 1e-300)


def _explain_markers(axes: Axes) -> None:
    """Add one grey legend for line and markers of all runs. Colours stand for runs."""
    sets = {str(line.get_label()): line.get_marker() for line in axes.get_lines() if line.get_marker() in MARKERS}
    handles = [Line2D([], [], color="#666666", label="train")]
    handles += [Line2D([], [], color="#666666", marker=marker, label=label) for label, marker in sets.items()]
    axes.legend(handles=handles, loc="best")


def _twin(axes: Axes, panel: Panel, colour: str) -> Axes:
    twin = axes.twinx()
    twin.set_ylabel(panel.twin_unit, color=colour)
    twin.tick_params(axis="y", colors=colour)
    twin.spines["right"].set_visible(True)
    twin.grid(False)
    if panel.fraction:
        twin.set_ylim(-0.03, 1.03)
    return twin


def _set_log_scale(axes: Axes, floor: float) -> None:
    """Make the axis logarithmic, with a tick every few powers of ten. The tick at the floor has a "≤"."""

    def write(value: float, _: int) -> str:
        power = f"10^{{{round(math.log10(value))}}}"
        return rf"$\leq {power}$" if value <= floor else f"${power}$"

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(write))
    low, high = axes.get_ylim()
    low = max(low, floor / 1.6)
    axes.set_ylim(low, high * (high / low) ** 0.35)  # room for the legend


def _series(run: Run, metric: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return steps int64 [N] and values float64 [N] of the rows with the metric; None if no value is finite."""
    points = [(record["step"], record[metric]) for record in run if metric in record]
    if not any(math.isfinite(value) for _, value in points):
        return None
    steps, values = zip(*points)
    return np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64)


def _colours(count: int) -> list[str]:
    return [PALETTE[index % len(PALETTE)] for index in range(count)]


def _write_heading(figure: Figure, runs: dict[str, Run]) -> None:
    """Write the run's name and number of steps on top; for several runs, the legend."""
    if len(runs) > 1:
        handles = [
            Line2D([], [], color=colour, linewidth=3, label=name) for name, colour in zip(runs, _colours(len(runs)))
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=min(len(runs), 5), fontsize=12, frameon=False)
        return
    (name, run), *_ = runs.items()
    steps = int(run[-1]["step"]) if run else 0
    updates = next((f", {record['updates']:.0f} gradient steps" for record in reversed(run) if "updates" in record), "")
    count = "1 rollout step" if steps == 1 else f"{steps} rollout steps"
    figure.suptitle(f"{name}: {count}{updates}", fontsize=14, x=0.01, ha="left")
