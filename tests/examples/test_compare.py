"""examples/compare.py: its studies are valid runs, what is finished is left alone, and table and plot show what runs have reached.

Training is made up: a process that writes the files of a run at once.
"""

from __future__ import annotations

import importlib.util
import io
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import matplotlib.image
import pytest
from rich.console import Console

from dapo_mcore.config.file import load_config, record_config
from dapo_mcore.errors import ConfigError, TrainingError

SCRIPT = Path(__file__).parents[2] / "examples" / "compare.py"
LAST = {"DAPO": (0.96, 0.98), "GRPO": (0.7, 0.9)}
"""Accuracy at the end, of seeds 0 and 1."""


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def study(compare: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str:
    """A study of 20 steps with two variants and two seeds."""
    made = compare.Study(
        "made up",
        ("num_rollout_steps=20",),
        {"DAPO": (), "GRPO": ("sampling.style=none",)},
        range(2),
        ("actor/entropy", "entropy"),
    )
    monkeypatch.setitem(compare.STUDIES, "made-up", made)
    return "made-up"


class Trainer:
    """In the place of multiprocessing's context: processes that have trained as soon as they are started. `started`: runs' names."""

    def __init__(self, status: int = 0):
        self.status, self.started = status, []

    def Process(self, *, args: tuple[Any, Path], name: str, **_: Any) -> SimpleNamespace:
        run, log = args
        done = {"is_alive": lambda: False, "terminate": lambda: None, "join": lambda: None, "exitcode": self.status}
        return SimpleNamespace(start=lambda: self._train(run, log), **done)

    def _train(self, run: Any, log: Path) -> None:
        self.started.append(run.name)
        log.write_text("error: the learning rate is odd\n")
        if self.status:
            return
        config = load_config(SCRIPT.with_name("quickstart.yaml"), run.words)
        (config.run_dir / "hf/final").mkdir(parents=True)
        record_config(config, config.run_dir)
        (config.run_dir / "cpu_seconds.txt").write_text("20.5\n9.5\n")
        variant = "GRPO" if config.sampling.style == "none" else "DAPO"
        rows = [{"step": 0, "val/heldout/mean@8": 0.25}]
        for step, accuracy in ((10, 0.8), (20, LAST[variant][config.seed])):
            more = {"actor/entropy": 1 / step, "sampling/samples_generated": 100, "time/step_s": 2.0}
            rows.append({"step": step, "val/heldout/mean@8": accuracy, **more})
        (config.run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def told(compare: ModuleType, *arguments: Any) -> str:
    console = Console(file=io.StringIO(), width=250, highlight=False)
    compare.compare(*arguments, console)
    return console.file.getvalue()


@pytest.mark.parametrize(
    "name", ["algorithms", "clip-higher", "clip-higher-mild", "dynamic-sampling", "token-mean", "overlong"]
)
def test_every_study_is_of_valid_runs_that_differ(compare: ModuleType, name: str, tmp_path: Path):
    runs = compare.plan(name, tmp_path, ())
    seeds = 3 if name == "algorithms" else 5
    configs = {key: load_config(compare.CONFIG, run.words) for key, run in runs.items()}
    assert len(configs) == len(compare.STUDIES[name].variants) * seeds == len({c.name for c in configs.values()})
    differing = {c.model_copy(update={"name": "", "seed": 0}).model_dump_json() for c in configs.values()}
    assert len(differing) == len(compare.STUDIES[name].variants) * 3  # starting policies
    assert all(c.warm_start is None and c.model.init == "pretrained" for c in configs.values())
    assert list(compare.STUDIES) == [
        "algorithms",
        "clip-higher",
        "clip-higher-mild",
        "dynamic-sampling",
        "token-mean",
        "overlong",
    ]


def test_runs_of_a_seed_share_a_start_and_finished_runs_are_left_alone(compare, study, monkeypatch, tmp_path):
    trainer = Trainer()
    monkeypatch.setattr(compare, "FORKS", trainer)
    first = told(compare, [study], tmp_path, None, ())
    assert trainer.started == [
        "start-0", "start-1", "made-up-DAPO-0", "made-up-GRPO-0", "made-up-DAPO-1", "made-up-GRPO-1",
    ]  # fmt: skip
    assert "run 4 of 6: made-up-GRPO-0 is done, 0.700 right" in first
    trainer.started.clear()
    (tmp_path / "made-up-GRPO-1").rename(tmp_path / "aside")
    again = told(compare, [study], tmp_path, None, ())
    assert trainer.started == ["made-up-GRPO-1"]
    assert first.partition("made up")[2] == again.partition("made up")[2]


def test_the_table_has_means_and_ranges_over_seeds(compare, study, monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "FORKS", Trainer())
    lines = told(compare, [study], tmp_path, tmp_path / "plots/it.png", ()).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("made-up: made up"))
    cells = [[cell.strip() for cell in re.split(r"\s{2,}", line.strip())] for line in lines[start + 1 : start + 11]]
    assert cells == [
        ["2 seeds", "DAPO", "GRPO"],
        ["best accuracy", "0.970 (0.960..0.980)", "0.850 (0.800..0.900)"],  # GRPO with seed 0: 0.8 before the end
        ["last accuracy", "0.970 (0.960..0.980)", "0.800 (0.700..0.900)"],
        ["steps to 0.9", "20 (20..20)", "20 (20..20), 1 of 2"],
        ["samples to 0.9", "200 (200..200)", "200 (200..200), 1 of 2"],
        ["samples", "200 (200..200)", "200 (200..200)"],
        ["step time", "4s (4s..4s)", "4s (4s..4s)"],
        ["CPU time", "30s (30s..30s)", "30s (30s..30s)"],  # of two starts
        ["entropy at the end", "0.075 (0.075..0.075)", "0.075 (0.075..0.075)"],
        ["against the first", "-0.170 (-0.260..-0.080)"],  # seed by seed: 0.7 - 0.96 and 0.9 - 0.98
    ]
    assert matplotlib.image.imread(tmp_path / "plots/it.png").std() > 0.05


def test_nothing_known_is_no_number(compare: ModuleType):
    assert compare.spread([float("nan")] * 3, "{:.0f}".format) == "0 of 3"


def test_a_folder_of_other_settings_is_not_taken(compare, study, monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "FORKS", Trainer())
    told(compare, [study], tmp_path, None, ())
    with pytest.raises(ConfigError, match=r"made-up-DAPO-0 has a run of other settings; delete the folder"):
        told(compare, [study], tmp_path, None, ("optimizer.lr=1e-4",))


def test_a_run_that_fails_ends_with_the_last_line_of_its_log(compare, study, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compare, "FORKS", Trainer(status=2))
    with pytest.raises(TrainingError, match="start-0 ended with status 2: error: the learning rate is odd; its log is"):
        told(compare, [study], tmp_path, None, ())
    assert compare.main([study, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: start-0 ended with status 2: error: the learning rate is odd")
