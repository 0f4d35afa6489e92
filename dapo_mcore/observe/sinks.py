"""Where metrics go: metrics.jsonl (the record everything else reads), TensorBoard, and optionally wandb.

Change here: the file's format, and which services receive the numbers. Only rank 0 opens sinks.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from dapo_mcore.config import ObserveConfig
from dapo_mcore.errors import ConfigError, DataError

METRICS_FILE = "metrics.jsonl"


class Sink(Protocol):
    """Receives one rollout step's metrics."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricSinks:
    """The sinks of one run, as one.

    `resume_step` is the last rollout step that the loaded checkpoint holds: later lines are dropped, because those
    steps are run again. None means a fresh run, which starts with an empty file.
    Raises ConfigError when wandb is configured but not installed, before anything is written.
    """

    def __init__(self, run_dir: Path, config: ObserveConfig, resume_step: int | None = None) -> None:
        wandb = _import_wandb() if config.wandb_project else None
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._sinks: list[Sink] = [JsonlSink(run_dir / METRICS_FILE, resume_step)]
        if config.tensorboard:
            self._sinks.append(TensorBoardSink(run_dir / "tensorboard", resume_step))
        if wandb is not None:
            self._sinks.append(WandbSink(wandb, str(config.wandb_project), run_dir, resume_step))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of rollout step `step`; call once a step (step 0 is the evaluation before training)."""
        numbers = {name: float(value) for name, value in metrics.items()}  # numpy and torch scalars are not JSON
        for sink in self._sinks:
            sink.write(step, numbers)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> MetricSinks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class JsonlSink:
    """One JSON object a line, `step` first. A line reaches the operating system whole or is dropped on resume."""

    def __init__(self, path: Path, resume_step: int | None) -> None:
        _keep_until(path, resume_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._file.write(json_line({"step": step, **metrics}))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """Event files under `tensorboard/`; on resume, TensorBoard hides the events of the steps that are run again."""

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds of import, not needed to read metrics

        self._writer = SummaryWriter(str(folder), purge_step=0 if resume_step is None else resume_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A Weights & Biases run whose id is kept in the run folder, so that a resumed run continues the same page.

    Steps are logged as the metric `rollout_step`: wandb's own counter refuses to go back after a resume.
    """

    def __init__(self, wandb: Any, project: str, run_dir: Path, resume_step: int | None) -> None:
        id_file = run_dir / "wandb_id.txt"
        if resume_step is None or not id_file.is_file():
            id_file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        run_id = id_file.read_text(encoding="utf-8").strip()
        self._run = wandb.init(project=project, name=run_dir.name, dir=str(run_dir), id=run_id, resume="allow")
        self._run.define_metric("*", step_metric="rollout_step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"rollout_step": step, **metrics})

    def close(self) -> None:
        self._run.finish()


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The steps of a run in file order, each with `step` and its metrics; what was NaN or infinite reads as NaN.

    A broken last line (a run that was killed, or is writing now) is left out.
    Raises DataError when there is no metrics.jsonl, or when another line is broken.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        raise DataError(f"no {METRICS_FILE} in {run_dir}; give the folder of a run (output_dir/name of its config)")
    return [{k: math.nan if v is None else v for k, v in record.items()} for record in _read_records(path)]


def json_line(record: Mapping[str, Any]) -> str:
    """The record as one line of strict JSON in valid text; NaN and infinities, which JSON lacks, become null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return valid_text(json.dumps(finite, ensure_ascii=False, allow_nan=False)) + "\n"


def valid_text(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair that stands alone: what responses or rewards hold may have
    them, and no file or terminal takes them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_records(path: Path) -> list[dict[str, Any]]:
    lines = path.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:  # a cut multi-byte character or a cut object
            if number < len(lines):
                raise DataError(f"{path} line {number} of {len(lines)} is not JSON: {error}; delete it") from error
    return records


def _keep_until(path: Path, step: int | None) -> None:
    """Rewrites the file with the whole lines up to `step`, in one rename."""
    records = _read_records(path) if step is not None and path.is_file() else []
    kept = [record for record in records if record["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(map(json_line, kept)), encoding="utf-8")
    os.replace(temporary, path)


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "observe.wandb_project is set, but wandb is not installed; pip install wandb, or leave it null"
        ) from error
    return wandb


def check_wandb() -> None:
    """Raise ConfigError where wandb is not installed, or has no key for its server and would ask for one."""
    wandb = _import_wandb()
    if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.api.api_key:
        raise ConfigError(
            "observe.wandb_project is set, but wandb has no API key; run `wandb login`, set WANDB_API_KEY, or set "
            "WANDB_MODE=offline"
        )
