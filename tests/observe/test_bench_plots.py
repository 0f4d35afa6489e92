"""Benchmark plots from a made-up file: what is drawn, what is left out, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dapo_mcore.errors import DataError
from dapo_mcore.observe.bench_plots import draw_bench, plot_bench, plot_benches
from tests.observe.png import png_size


def row(name: str, median: float | None, peak: float | None = None) -> dict:
    ms = median and {"median": median, "p20": 0.9 * median, "p80": 1.1 * median, "repeats": 5}
    return {"contender": name, "ms": ms, "peak_mib": peak, "errors": None, "failure": None if ms else "absent"}


def shape(tokens: int, rows: list[dict], tensor_parallel: int = 1) -> dict:
    gemms = {"median": 2.0, "p20": 2.0, "p80": 2.0, "repeats": 5}
    return {
        "model": "m",
        "tensor_parallel": tensor_parallel,
        "tokens": tokens,
        "hidden": 8,
        "gemms_ms": gemms,
        "rows": rows,
    }


def bench(shapes: list[dict]) -> dict:
    header = {"machine": "made up", "date": "2026-01-01T00:00:00", "commit": "none", "versions": {"torch": "2"}}
    return header | {"shapes": shapes}


def write(path: Path, shapes: list[dict]) -> Path:
    path.write_text(json.dumps(bench(shapes)))
    return path


SHAPES = [
    shape(512, [row("ours", 3.0, 100.0), row("x", None), row("y", 5.0, 50.0)]),
    shape(256, [row("ours", 2.5, 100.0), row("x", None), row("y", None)]),
    shape(256, [row("ours", 2.5, 100.0)], tensor_parallel=8),
]


def test_one_column_a_model_and_split_and_a_row_for_memory_where_measured(tmp_path: Path) -> None:
    with_memory = plot_bench(write(tmp_path / "a.json", SHAPES), tmp_path / "new" / "a.png")
    without = plot_bench(write(tmp_path / "b.json", [shape(256, [row("ours", 2.5)])]), tmp_path / "b.png")
    one_size = plot_bench(write(tmp_path / "c.json", SHAPES[:1]), tmp_path / "c.png")
    assert png_size(one_size)[1] < png_size(with_memory)[1], "time against memory"
    assert png_size(with_memory)[0] == png_size(without)[0] and png_size(with_memory)[1] > png_size(without)[1]


def test_times_are_drawn_over_those_of_the_gemms_by_tokens() -> None:
    figure = draw_bench(bench(SHAPES))
    axes, other_split, *_ = figure.axes
    assert [axes.get_title(), other_split.get_title()] == ["m, TP1", "m, TP8"]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["three GEMMs alone", "ours", "y"], "never measured: not in the legend"
    roofline, ours, other = ([*zip(line.get_xdata(), line.get_ydata())] for line in axes.lines)
    assert roofline == [(256, 1.0), (512, 1.0)]
    assert ours == [(256, 1.25), (512, 1.5)] and other == [(512, 2.5)]
    assert [text.get_text() for text in axes.texts] == ["2 ms", "2 ms"]


def test_every_contender_has_a_colour_of_its_own_and_ours_are_thick() -> None:
    names = [*(f"ours {n}" for n in range(5)), *(f"other {n}" for n in range(9))]
    legend = draw_bench(bench([shape(256, [row(name, 1.0) for name in names])])).legends[0]
    _, *lines = legend.get_lines()
    assert len({line.get_color() for line in lines}) == 14
    assert min(line.get_linewidth() for line in lines[:5]) > max(line.get_linewidth() for line in lines[5:])


def test_one_size_is_drawn_as_time_against_memory_with_sizes_joined_and_names_that_hide_nothing() -> None:
    rows = [row("ours, 4 GB", 3.0, 2048.0), row("ours, 2 GB", 3.2, 1024.0), row("x", 3.0, 2050.0), row("y", 8.0, 512.0)]
    rows += [
        row("slow", 212.0, 2048.0),
        row("absent", None),
        row("ours, 3 GB", 3.1, 1500.0),
        row("ours, bf16, 2 GB", 2.5, 900.0),
    ]
    (axes,) = draw_bench(bench([shape(256, rows)])).axes
    (joined,) = (line for line in axes.lines if len(line.get_xdata()) == 3)
    assert [*zip(joined.get_xdata(), joined.get_ydata())] == [(1.0, 1.6), (1500 / 1024, 1.55), (2.0, 1.5)]
    names = [text for text in axes.texts if text.xycoords == "data" and text.get_text()]
    found = [name.get_text() for name in names]
    assert found[:2] == ["ours, 4 GB, 3 ms", "2 GB, 3.2 ms"] and found[4:] == [
        "slow, 212 ms",
        "3 GB, 3.1 ms",
        "ours, bf16, 2 GB, 2.5 ms",
    ]
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert all(box.count_overlaps(boxes) == 1 for box in boxes), "each overlaps itself alone"
    points = axes.transData.transform([name.xy for name in names])
    assert not any(box.contains(*point) for box in boxes for point in points)


def test_a_marker_is_filled_where_every_token_has_its_gradient() -> None:
    errors = [{"grad_hidden": 1e-3, "grad_weight": 1e-3, "worst_token": worst} for worst in (0.005, 0.3)]
    rows = [row("exact", 3.0, 512.0) | {"errors": errors[0]}, row("rounded", 3.0, 2048.0) | {"errors": errors[1]}]
    (axes,) = draw_bench(bench([shape(256, rows)])).axes
    exact, rounded = (line for line in axes.lines if len(line.get_xdata()) == 1)
    assert exact.get_markerfacecolor() == exact.get_color() and rounded.get_markerfacecolor() == "white"


def test_two_sizes_are_two_panels_of_time_against_memory() -> None:
    rows = [row("ours", 3.0, 512.0), row("x", 4.0, 2048.0)]
    figure = draw_bench(bench([shape(4096, rows), shape(256, rows)]))
    assert [axes.get_title() for axes in figure.axes] == ["m, TP1, 256 loss tokens", "m, TP1, 4,096 loss tokens"]


def test_each_file_gets_a_png_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "kernels" / "results"
    folder.mkdir(parents=True)
    files = [write(folder / f"{name}.json", SHAPES) for name in "ab"]
    assert plot_benches(files) == [folder / "a.png", folder / "b.png"]
    assert [path.name for path in plot_benches([])] == ["a.png", "b.png"]
    with pytest.raises(DataError, match=r"--out x\.png names one PNG, but there are 2 files"):
        plot_benches(files, Path("x.png"))


@pytest.mark.parametrize("content", ["not JSON", "[]", '{"shapes": []}'])
def test_a_file_that_is_no_benchmark_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match=r"x\.json (is no benchmark JSON|holds no `shapes`)"):
        plot_benches([tmp_path / "x.json"])


def test_without_any_file_the_message_says_where_they_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no benchmark JSON in kernels/results"):
        plot_benches([])
