"""MLflow and SwanLab, side by side: their own libraries where they are installed, else modules that stand for them."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dapo_mcore.config.sections import ObserveConfig
from dapo_mcore.errors import ConfigError
from dapo_mcore.observe.sinks import MetricSinks, check_services
from dapo_mcore.observe.trackers import mlflow_name

CONFIG = ObserveConfig(tensorboard=False, mlflow_experiment="numbers", swanlab_project="p")
ROW = {"val/aime/mean@32": 0.5, "actor/loss": math.nan}


class FakeError(Exception):
    pass


class FakeClient:
    """What MlflowSink uses of MLflow's client. It counts runs, and fails from step 9 on."""

    def __init__(self) -> None:
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, list[tuple[str, int]]] = {}
        self.states: list[str] = []

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        return self.experiments.setdefault(name, "1")

    def create_run(self, number: str, run_name: str) -> Any:
        assert (number, run_name) == ("1", "run")
        run_id = f"id{len(self.runs)}"
        self.runs[run_id] = []
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def update_run(self, run_id: str, status: str) -> None:
        self.states.append(f"{run_id} {status}")

    def log_batch(self, run_id: str, metrics: list[Any]) -> None:
        if metrics[0][3] >= 9:
            raise FakeError("no connection\ndetails")
        self.runs[run_id] += [(name, step) for name, _, _, step in metrics]

    def set_terminated(self, run_id: str) -> None:
        self.states.append(f"{run_id} FINISHED")


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    client, started, logged = FakeClient(), [], []
    run = SimpleNamespace(log=lambda row, step: logged.append((step, row)), finish=lambda: logged.append("end"))
    mlflow = SimpleNamespace(
        MlflowClient=lambda: client,
        entities=SimpleNamespace(Metric=lambda *fields: fields),
        exceptions=SimpleNamespace(MlflowException=FakeError),
    )
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "swanlab", SimpleNamespace(init=lambda **options: started.append(options) or run))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:1")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    return SimpleNamespace(client=client, started=started, logged=logged)


def test_both_get_each_step_and_a_resumed_run_goes_on_with_its_ids(tmp_path: Path, fakes: SimpleNamespace) -> None:
    for resume_step in (None, 1, None):
        with MetricSinks(tmp_path / "run", CONFIG, resume_step) as sinks:
            sinks.write(2, ROW)
    both = [("val/aime/mean_at_32", 2), ("actor/loss", 2)]
    assert fakes.client.runs == {"id0": [*both, *both], "id1": both}
    assert fakes.client.states == ["id0 FINISHED", "id0 RUNNING", "id0 FINISHED", "id1 FINISHED"]
    ids = [options["id"] for options in fakes.started]
    assert ids[0] == ids[1] != ids[2] and len(ids[0]) == 21
    assert fakes.logged[0][0] == 2 and fakes.logged[0][1].keys() == ROW.keys() and fakes.logged.count("end") == 3


def test_a_service_that_fails_costs_one_line_and_the_other_goes_on(tmp_path: Path, fakes: SimpleNamespace) -> None:
    lines: list[str] = []
    with MetricSinks(tmp_path / "run", CONFIG, None, lines.append) as sinks:
        for step in (9, 10):
            sinks.write(step, ROW)
    assert lines == ["warning: cannot write to MLflow: no connection; training goes on"]
    assert [row[0] for row in fakes.logged[:2]] == [9, 10]


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("mlflow_experiment", "MLFLOW_TRACKING_URI is not: set it to your server"),
        ("swanlab_project", "SwanLab has no API key: run `swanlab login`, set SWANLAB_API_KEY"),
    ],
)
def test_what_is_missing_is_told_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fakes: SimpleNamespace, key: str, told: str
) -> None:
    config, package = ObserveConfig(**{key: "x"}), key.partition("_")[0]
    for name in ("MLFLOW_TRACKING_URI", "SWANLAB_MODE", "SWANLAB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SWANLAB_SAVE_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match=told):
        check_services(config)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ConfigError, match=f"observe.{key} is set, but {package} is not installed; pip install {package}"
    ):
        check_services(config)


def test_names_have_only_characters_that_mlflow_allows() -> None:
    assert mlflow_name("val/aime-2024/best@8") == "val/aime-2024/best_at_8"
    assert mlflow_name("mismatch/from_1e-3 (é)") == "mismatch/from_1e-3 ___"


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_itself_keeps_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    config = CONFIG.model_copy(update={"swanlab_project": None})
    for resume_step, step in ((None, 1), (1, 2)):
        with MetricSinks(tmp_path / "run", config, resume_step) as sinks:
            sinks.write(step, ROW)
    run_id = (tmp_path / "run" / "mlflow_id.txt").read_text()
    history = mlflow.MlflowClient().get_metric_history(run_id, "val/aime/mean_at_32")
    assert [(row.step, row.value) for row in history] == [(1, 0.5), (2, 0.5)]


@pytest.mark.skipif(importlib.util.find_spec("swanlab") is None, reason="swanlab is not installed")
def test_swanlab_itself_takes_the_numbers_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    config = CONFIG.model_copy(update={"mlflow_experiment": None})
    for resume_step, step in ((None, 1), (1, 2)):
        with MetricSinks(tmp_path / "run", config, resume_step) as sinks:
            sinks.write(step, ROW)
    run_id = (tmp_path / "run" / "swanlab_id.txt").read_text()
    folders = list((tmp_path / "run" / "swanlab").glob(f"run-*{run_id}*"))
    assert folders and any(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
