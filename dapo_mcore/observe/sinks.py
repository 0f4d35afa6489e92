"""Outputs for metrics: metrics.jsonl (which plots and resumed runs read), TensorBoard, and optionally wandb, MLflow and SwanLab.

Change here: the file's format, and which services get the metrics. Only rank 0 opens sinks.
"""

from __future__ import annotations

import json
import math
import netrc
import os
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from dapo_mcore.config.sections import ObserveConfig
from dapo_mcore.errors import ConfigError, DapoError, DataError, output_error
from dapo_mcore.observe.metrics import current_name
from dapo_mcore.observe.trackers import MlflowSink, SwanlabSink, check_trackers

METRICS_FILE = "metrics.jsonl"


class Sink(Protocol):
    """Receives one rollout step's metrics."""

    name: str

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricSinks:
    """All sinks of one run.

    resume_step  the last rollout step of the loaded checkpoint. Later rows are dropped, because those steps run again.
                 None means a new run, which starts with an empty file.
    tell         gets warnings. Rows that the disk refuses wait in memory; training continues without a failing service.
    Raises ConfigError if a service is configured but not installed, before anything is written.
    """

    def __init__(
        self,
        run_dir: Path,
        config: ObserveConfig,
        resume_step: int | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        wandb = _import_wandb() if config.wandb_project else None
        check_trackers(config)
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._tell = tell
        self._record = JsonlSink(run_dir / METRICS_FILE, resume_step, tell)
        self._services: list[Sink] = []
        if config.tensorboard:
            opened = partial(TensorBoardSink, run_dir / "tensorboard", resume_step)
            attempt("write to TensorBoard", lambda: self._services.append(opened()), tell)
        if wandb is not None:
            self._services.append(WandbSink(wandb, str(config.wandb_project), run_dir, resume_step))
        for kind, where in ((MlflowSink, config.mlflow_experiment), (SwanlabSink, config.swanlab_project)):
            if where is not None:
                opened = partial(kind, where, run_dir, resume_step)
                attempt(f"write to {kind.name}", lambda opened=opened: self._services.append(opened()), tell)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of rollout step `step`, once per step (step 0 is the evaluation before training)."""
        numbers = {name: float(value) for name, value in metrics.items()}  # numpy and torch scalars are not JSON
        self._record.write(step, numbers)
        for service in list(self._services):
            if not attempt(f"write to {service.name}", partial(service.write, step, numbers), self._tell):
                self._services.remove(service)
                with suppress(OSError):
                    service.close()

    def amend(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add later metrics to the row of rollout step `step`, which is already on disk."""
        numbers = {name: float(value) for name, value in metrics.items()}
        self._record.amend(step, numbers)
        for service in self._services:
            attempt(f"write to {service.name}", partial(service.write, step, numbers), self._tell)

    def close(self) -> None:
        self._record.close()
        for service in self._services:
            attempt(f"write to {service.name}", service.close, self._tell)
        self._services = []

    def __enter__(self) -> MetricSinks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class JsonlSink:
    """One JSON object per line, `step` first. An incomplete line is dropped on resume."""

    def __init__(self, path: Path, resume_step: int | None, tell: Callable[[str], None] = lambda _: None) -> None:
        if dropped := _keep_until(path, resume_step):
            told = f"step {dropped[0]}" if len(dropped) == 1 else f"steps {dropped[0]} to {dropped[-1]}"
            tell(f"rollout {told} will be done again: the checkpoint is older")
        self._path, self._tell = path, tell
        self._file = path.open("ab", buffering=0)
        self._waiting: list[bytes] = []

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the row. Rows that the disk refuses are kept and written with the next row."""
        self._waiting.append(json_line({"step": step, **metrics}).encode())
        self._flush()

    def close(self) -> None:
        if self._waiting and not self._file.closed:
            self._flush()
        self._file.close()

    def amend(self, step: int, metrics: Mapping[str, float]) -> None:
        """Rewrite the file with more metrics in one row."""
        records = [{**row, **metrics} if row["step"] == step else row for row in _read_records(self._path)]
        _replace(self._path, records)
        self._file.close()
        self._file = self._path.open("ab", buffering=0)

    def _flush(self) -> None:
        if attempt(f"write {self._path}", self._append, self._tell):
            self._waiting.clear()

    def _append(self) -> None:
        end, data = os.fstat(self._file.fileno()).st_size, b"".join(self._waiting)
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError:
            self._file.truncate(end)  # no partial line before later rows
            raise


def attempt(doing: str, action: Callable[[], object], tell: Callable[[str], None]) -> bool:
    """Call `action`, which training does not need. If the operating system refuses it, warn and return False."""
    try:
        action()
    except OSError as error:
        refusal = output_error(error, doing)
        if refusal is error:
            raise
        tell(f"warning: {refusal}; training goes on")
        return False
    except DapoError as error:
        tell(f"warning: cannot {doing}: {error}; training goes on")
        return False
    return True


class TensorBoardSink:
    """Event files in `tensorboard/`. After a resume, TensorBoard hides the events of the steps that run again."""

    name = "TensorBoard"

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes seconds, and reading metrics does not need it

        self._writer = SummaryWriter(str(folder), purge_step=0 if resume_step is None else resume_step + 1)
        self._hook = threading.excepthook
        threading.excepthook = self._on_thread_error

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._hook

    def _on_thread_error(self, failure: Any) -> None:
        """Ignore errors of TensorBoard's thread: `write` raises the same error."""
        if type(failure.thread).__module__.partition(".")[0] != "tensorboard":
            self._hook(failure)


class WandbSink:
    """A Weights & Biases run. Its id is stored in the run folder, so that a resumed run continues the same page.

    Steps are logged as the metric `rollout_step`: wandb's own counter cannot go back after a resume.
    """

    name = "wandb"

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
    """Return the steps of a run in file order, each with `step` and its metrics under today's names (metrics.OLD_NAMES).

    NaN and infinities read as NaN. A broken last line (the run was killed, or is writing now) is left out.
    Raise DataError if there is no metrics.jsonl, or if another line is broken.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        raise DataError(f"no {METRICS_FILE} in {run_dir}; give the folder of a run (output_dir/name of its config)")
    return [
        {current_name(name): math.nan if value is None else value for name, value in record.items()}
        for record in _read_records(path)
    ]


def json_line(record: Mapping[str, Any]) -> str:
    """Return the record as one line of strict JSON in valid text. NaN and infinities become null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return valid_text(json.dumps(finite, ensure_ascii=False, allow_nan=False)) + "\n"


def valid_text(text: str) -> str:
    """Return the text with U+FFFD for each unpaired surrogate: responses may have them, files and terminals refuse them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_records(path: Path) -> list[dict[str, Any]]:
    lines = path.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:  # a truncated character or object
            if number < len(lines):
                raise DataError(f"{path} line {number} of {len(lines)} is not JSON: {error}; delete it") from error
    return records


def _keep_until(path: Path, step: int | None) -> list[int]:
    """Rewrite the file with the complete lines up to `step`, in one rename. Return the steps of the others, in order."""
    records = _read_records(path) if step is not None and path.is_file() else []
    _replace(path, [record for record in records if record["step"] <= step])
    return sorted({record["step"] for record in records if record["step"] > step})


def _replace(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(map(json_line, records)), encoding="utf-8")
    os.replace(temporary, path)


def check_services(config: ObserveConfig) -> None:
    """Raise ConfigError, before anything is built, if a service is configured but not installed or has no API key."""
    check_trackers(config)
    if config.wandb_project is None:
        return
    _import_wandb()
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun", "shared"):
        return
    if (
        not any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"))
        and not _has_netrc_key()
    ):
        raise ConfigError(
            "observe.wandb_project is set, but wandb has no API key: run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline "
            "to send the numbers later"
        )


def _has_netrc_key() -> bool:
    """Return True if `wandb login` has left a key for the server."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    files = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for file in map(os.path.expanduser, files):
        with suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(file).authenticators(host):
                return True
    return False


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "observe.wandb_project is set, but wandb is not installed; pip install wandb, or leave it null"
        ) from error
    return wandb


def check_wandb() -> None:
    """Raise ConfigError if wandb is not installed or has no API key for its server."""
    wandb = _import_wandb()
    if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.api.api_key:
        raise ConfigError(
            "observe.wandb_project is set, but wandb has no API key; run `wandb login`, set WANDB_API_KEY, or set "
            "WANDB_MODE=offline"
        )
