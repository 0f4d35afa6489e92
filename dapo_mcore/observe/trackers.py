"""MLflow and SwanLab: the metrics of a run, through their own libraries, beside the other outputs.

Change here: how a run appears there. sinks.py opens them, and goes on without one that fails.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from dapo_mcore.config.sections import ObserveConfig
from dapo_mcore.errors import ConfigError, DapoError

_MLFLOW_BATCH = 1000
"""Metrics that MLflow takes in one request."""

_MLFLOW_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""Its own patience, minutes with a server that is away, would hold up training."""


def check_trackers(config: ObserveConfig) -> None:
    """Raise ConfigError, before anything is built, if a tracker is configured but not installed, or does not know where to write."""
    if config.mlflow_experiment:
        _import("mlflow", "mlflow_experiment")
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            raise ConfigError(
                "observe.mlflow_experiment is set, but MLFLOW_TRACKING_URI is not: set it to your server, or to a place such as "
                "sqlite:////home/me/mlflow.db (package mlflow), so that the numbers do not go to the folder of this command"
            )
    if config.swanlab_project:
        _import("swanlab", "swanlab_project")
        saved = Path(os.environ.get("SWANLAB_SAVE_DIR", Path.home() / ".swanlab")) / ".netrc"
        offline = os.environ.get("SWANLAB_MODE") in ("offline", "local", "disabled")
        if not (offline or os.environ.get("SWANLAB_API_KEY") or saved.is_file()):
            raise ConfigError(
                "observe.swanlab_project is set, but SwanLab has no API key: run `swanlab login`, set SWANLAB_API_KEY, or "
                "SWANLAB_MODE=offline to send the numbers later"
            )


class MlflowSink:
    """A run of an MLflow experiment, at MLFLOW_TRACKING_URI. Its id is stored in the run folder, and a resumed run goes on with it.

    MLflow's names have no `@`: val/aime/mean@32 is val/aime/mean_at_32 there. After a resume it keeps both numbers of a step that
    ran again.
    """

    name = "MLflow"

    def __init__(self, experiment: str, run_dir: Path, resume_step: int | None) -> None:
        for name, value in _MLFLOW_PATIENCE.items():
            os.environ.setdefault(name, value)
        mlflow = _import("mlflow", "mlflow_experiment")
        self._metric, self._error = mlflow.entities.Metric, mlflow.exceptions.MlflowException
        self._client = mlflow.MlflowClient()
        self._run_id = self._told(lambda: self._open(experiment, run_dir, resume_step))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        rows = [self._metric(mlflow_name(name), value, now, step) for name, value in metrics.items()]
        for start in range(0, len(rows), _MLFLOW_BATCH):
            part = rows[start : start + _MLFLOW_BATCH]
            self._told(lambda part=part: self._client.log_batch(self._run_id, metrics=part))

    def close(self) -> None:
        self._told(lambda: self._client.set_terminated(self._run_id))

    def _open(self, experiment: str, run_dir: Path, resume_step: int | None) -> str:
        note = run_dir / "mlflow_id.txt"
        if resume_step is not None and note.is_file():
            run_id = note.read_text(encoding="utf-8").strip()
            self._client.update_run(run_id, status="RUNNING")
            return run_id
        found = self._client.get_experiment_by_name(experiment)
        number = self._client.create_experiment(experiment) if found is None else found.experiment_id
        run_id = self._client.create_run(number, run_name=run_dir.name).info.run_id
        note.write_text(run_id, encoding="utf-8")
        return run_id

    def _told(self, action: Any) -> Any:
        try:
            return action()
        except self._error as error:
            raise DapoError(str(error).partition("\n")[0]) from error


class SwanlabSink:
    """A SwanLab run. Its id is stored in the run folder, and a resumed run goes on with it. SwanLab keeps the first number of a step
    that ran again after a resume."""

    name = "SwanLab"

    def __init__(self, project: str, run_dir: Path, resume_step: int | None) -> None:
        swanlab = _import("swanlab", "swanlab_project")
        note, folder = run_dir / "swanlab_id.txt", run_dir / "swanlab"
        if resume_step is None or not note.is_file():
            note.write_text(uuid.uuid4().hex[:21], encoding="utf-8")
        folder.mkdir(exist_ok=True)
        run_id = note.read_text(encoding="utf-8").strip()
        self._run = swanlab.init(project=project, name=run_dir.name, log_dir=str(folder), id=run_id, resume="allow")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def mlflow_name(name: str) -> str:
    """Return a metric's name in the characters that MLflow allows."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"), flags=re.ASCII)


def _import(package: str, key: str) -> ModuleType:
    try:
        return import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"observe.{key} is set, but {package} is not installed; pip install {package}, or leave it null"
        ) from error
