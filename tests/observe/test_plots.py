"""What the plots of a run contain, for complete and incomplete metrics. How they look, only eyes can judge."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from dapo_mcore.algo.correction import mismatch_metrics, mismatch_stats
from dapo_mcore.errors import DataError
from dapo_mcore.observe.metrics import current_name, describe
from dapo_mcore.observe.plots import PANELS, draw_panel, plot_run, plot_runs, smooth
from dapo_mcore.observe.sinks import json_line
from tests.observe.png import png_size

KEYS = [curve.metric for panel in PANELS for curve in panel.curves]


def fake_run(folder: Path, steps: int, keys: list[str] = KEYS) -> Path:
    folder.mkdir(parents=True)
    records = [
        {"step": s, **{key: 0.5 + 0.1 * math.sin(s) for key in keys}, "val/a/mean@8": 0.3} for s in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(map(json_line, records)))
    return folder


@pytest.fixture
def axes():
    return Figure().subplots()


def test_every_plotted_metric_is_in_the_table() -> None:
    patterns = [panel.histogram.replace("<size>", "1e-3") for panel in PANELS if panel.histogram]
    assert [key for key in [*KEYS, *patterns] if describe(key) is None] == []


@pytest.mark.parametrize(("steps", "keys"), [(1, KEYS), (40, KEYS), (3, ["actor/loss"])])
def test_a_run_of_any_length_and_any_keys_gives_one_png(tmp_path: Path, steps: int, keys: list[str]) -> None:
    path = plot_run(fake_run(tmp_path / "run", steps, keys))
    assert path == tmp_path / "run" / "plot.png"
    assert png_size(path) == (1860, 864)


def test_a_run_of_an_older_version_gives_the_same_picture(tmp_path: Path) -> None:
    old_keys = ["response_length/mean", "response_length/truncated_ratio"]
    old = plot_run(fake_run(tmp_path / "old/run", 3, old_keys)).read_bytes()
    assert old == plot_run(fake_run(tmp_path / "new/run", 3, list(map(current_name, old_keys)))).read_bytes()
    assert old != plot_run(fake_run(tmp_path / "without/run", 3, old_keys[:1])).read_bytes()


def test_runs_are_compared_in_one_png_even_with_equal_folder_names(tmp_path: Path) -> None:
    folders = [fake_run(tmp_path / name / "run", 5) for name in ("one", "two")]
    out = tmp_path / "new" / "compare.png"
    assert plot_runs(folders, out) == out
    assert png_size(out) == (1860, 864)


def test_a_folder_without_metrics_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no metrics\.jsonl"):
        plot_run(tmp_path)


@pytest.mark.parametrize("content", ["", '{"step": 0, "val/a/mean@8": 0.3}\n'])
def test_a_run_without_a_step_is_an_error_and_leaves_no_plot(tmp_path: Path, content: str) -> None:
    started = fake_run(tmp_path / "started", 2)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.jsonl").write_text(content)
    told = r"metrics\.jsonl in .*new has 0 rollout steps, and a plot needs at least 1; wait for"
    with pytest.raises(DataError, match=told):
        plot_run(tmp_path / "new")
    with pytest.raises(DataError, match=told):
        plot_runs([started, tmp_path / "new"], tmp_path / "compare.png")
    assert list(tmp_path.rglob("*.png")) == []


def test_a_panel_without_numbers_says_so(axes) -> None:
    draw_panel(axes, PANELS[0], {"run": [{"step": 1, "actor/loss": math.nan}]})
    assert [text.get_text() for text in axes.texts] == ["not recorded"]


def test_short_runs_are_drawn_raw_and_long_runs_raw_and_smoothed(axes) -> None:
    run = [{"step": step, "actor/loss": float(step % 7)} for step in range(1, 41)]
    draw_panel(axes, PANELS[0], {"run": run[:20]})
    assert len(axes.lines) == 1
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [float(s % 7) for s in range(1, 21)])
    axes.clear()
    draw_panel(axes, PANELS[0], {"run": run})
    assert [len(line.get_xdata()) for line in axes.lines] == [40, 40]


def test_accuracy_shows_every_validation_set_at_the_steps_it_was_measured(axes) -> None:
    run = [{"step": 0, "val/a/mean@8": 0.1, "val/b/mean@4": 0.2}, {"step": 1, "reward/acc": 0.5}]
    run.append({"step": 2, "reward/acc": 0.6, "val/a/mean@8": 0.3, "val/a/best@8": 0.9})
    panel = next(panel for panel in PANELS if panel.val)
    draw_panel(axes, panel, {"run": run})
    lines = {line.get_label(): list(zip(line.get_xdata(), line.get_ydata())) for line in axes.lines}
    assert lines["a mean@8"] == [(0, 0.1), (2, 0.3)]
    assert lines["b mean@4"] == [(0, 0.2)]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["train", "a mean@8", "b mean@4"]


def test_exact_agreement_is_shown_at_the_floor_of_the_mismatch_panel(axes) -> None:
    panel = next(panel for panel in PANELS if panel.floor)
    metric = panel.curves[0].metric
    for values in ([0.0, 1e-12, 1e-6], [0.0]):
        axes.clear()
        draw_panel(axes, panel, {"run": [{"step": step, metric: value} for step, value in enumerate(values)]})
        (line,) = axes.lines
        np.testing.assert_allclose(line.get_ydata(), np.maximum(values, 1e-8))
        ticks = dict(zip(axes.get_yticks(), (label.get_text() for label in axes.get_yticklabels())))
        assert axes.get_yscale() == "log" and ticks[1e-8] == r"$\leq 10^{-8}$"
        low, high = axes.get_ylim()
        assert low < 1e-8 and len([tick for tick in ticks if low <= tick <= high]) <= 8


def test_the_mismatch_panel_says_what_it_shows_and_what_is_good(axes) -> None:
    panel = next(panel for panel in PANELS if panel.floor)
    draw_panel(axes, panel, {"run": [{"step": 1, panel.curves[0].metric: 0.01}]})
    (note,) = (text.get_text() for text in axes.texts)
    assert "trainer" in note and "rollout engine" in note and "0 is perfect" in note and "bf16" in note
    assert "nats" in axes.get_ylabel()


def test_the_histogram_of_the_mismatch_shades_the_decades_that_hold_tokens(axes) -> None:
    engine = torch.zeros(4, dtype=torch.float64)
    far = [torch.tensor(sizes, dtype=torch.float64) for sizes in ([2e-3, 5e-3, 0.02, 0.5], [2e-3, 0.02, 0.03, 0.04])]
    run = [{"step": step, **mismatch_metrics(mismatch_stats(d, engine))} for step, d in zip((2, 4), far)]
    draw_panel(axes, next(panel for panel in PANELS if panel.histogram), {"run": run})
    (mesh,) = axes.collections
    np.testing.assert_allclose(mesh.get_array().reshape(3, 2), [[0.5, 0.25], [0.25, 0.75], [0.25, 0.0]])
    corners = mesh.get_coordinates()  # 1e-3 to 1, and half-way between the steps
    np.testing.assert_allclose(corners[:, 0, 1], [1e-3, 1e-2, 1e-1, 1.0])
    np.testing.assert_allclose(corners[0, :, 0], [1.5, 3.0, 4.5])


def test_smoothing_is_the_mean_of_known_neighbours() -> None:
    values = np.array([1.0, 2.0, 6.0, np.nan, 4.0])
    np.testing.assert_allclose(smooth(values), [1.5, 3.0, 4.0, np.nan, 4.0])
