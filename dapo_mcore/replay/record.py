"""The records of a run: what each rollout step trained on, and digests of all that came out.

Change here: the fields, and where they are stored. Reading checks hashes and types, so a damaged record is an error and never a
difference.

    run_dir/record/start_000000/            one for each start of the run, by the step that it went on from
                       start.json           StartRecord
                       config.yaml          its configuration, which `load_config` reads
                   step_000012/
                       step.json            StepRecord
                       batch.safetensors    BatchRecord; deleted after observe.record_keep steps, step.json never
    and in each folder manifest.json, the size and hash of each file
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from dapo_mcore.checkpoint.run_folder import is_name, new_partial, remove, step_of
from dapo_mcore.errors import CheckpointError, RecordError
from dapo_mcore.model_files.disk import sync_to_disk
from dapo_mcore.model_files.manifest import check_manifest, write_manifest
from dapo_mcore.model_files.safetensors_file import SafetensorsFile, SafetensorsWriter, TensorInfo
from dapo_mcore.types import FinishReason, Group, TrainBatch

T = TypeVar("T")
FINISH_REASONS: tuple[str, ...] = get_args(FinishReason)
STEP_FILE, BATCH_FILE = "step.json", "batch.safetensors"
START_FILE, CONFIG_FILE = "start.json", "config.yaml"
_START = "start_"
_REMEDY = "copy it again from where the run wrote it, or choose other steps"


@dataclass(frozen=True, slots=True)
class Digest:
    """What is kept of a tensor. No parallel layout changes it, but for the roundings of its elements (see digest.py).

    hash        16 hex digits. Equal hashes: every element is bitwise equal. Any changed bit and any two swapped elements change it.
    norm        the Euclidean norm, float64.
    projection  Σ ± elements with fixed signs, float64. For two tensors that differ by d, the two projections differ by about
                the norm of d, wherever the differences are.
    """

    hash: str
    norm: float
    projection: float


Digests = dict[str, Digest]
"""By Megatron's name of the tensor, with the layer's number in the whole model: `decoder.layers.3.mlp.linear_fc2.weight`."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What may change results besides configuration and data. Equal settings should give equal bits.

    layout       sizes of the parallel axes by name, and `world_size`
    versions     of packages by name, and of Python
    devices      number of ranks by device name: {"NVIDIA H100 80GB HBM3": 8}
    flags        switches of determinism and of threads: {"deterministic": "False", "torch threads": "1", "NCCL_ALGO": ""}
    """

    layout: dict[str, int]
    versions: dict[str, str]
    devices: dict[str, int]
    flags: dict[str, str]


@dataclass(frozen=True, slots=True)
class StartRecord:
    """A start of the run.

    after_step   the rollout step that it went on from; 0 for a new run
    num_updates  gradient steps that were done
    weights      of policy and critic before the first rollout step of this start: loaded, or after the warm start
    """

    after_step: int
    num_updates: int
    setting: Setting
    weights: Digests


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """A prompt of a batch: its uid and the row that it comes from, as in types.Prompt."""

    uid: str
    row: str


@dataclass(frozen=True, slots=True)
class UpdateRecord:
    """A gradient step.

    metrics    over all ranks: `grad_norm`, `lr`, the sums and maxima of actor/metrics.py, `aux_loss` if there is one
    skipped    True if a gradient was not finite
    logprobs   of the loss tokens, from this step's own forward pass
    gradients  summed over ranks, before clipping
    """

    metrics: dict[str, float]
    skipped: bool
    logprobs: Digest
    gradients: Digests


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A rollout step.

    num_updates   gradient steps done after it, since the run began
    shuffle_seed  of the order of groups in mini-batches; None without batch.shuffle
    prompts       by group number
    plan          plan[m][r][k]: the samples of micro-batch k of replica r in mini-batch m, by their numbers in the batch
    inputs        digests of what the gradient steps read, over all loss tokens: `old_logprobs` of the mini-batches that were
                  scored, `ref_logprobs` if there is a reference policy, `advantages`; with a critic `values` and `returns`
    updates       of the policy, in order
    weights       after the step, of the policy and as `critic.…` of the critic: fp32, where the optimizer has them
    """

    step: int
    num_updates: int
    shuffle_seed: int | None
    prompts: list[PromptRecord]
    plan: list[list[list[list[int]]]]
    inputs: Digests
    updates: list[UpdateRecord]
    weights: Digests


@dataclass(frozen=True, slots=True)
class Origins:
    """Where the samples of a batch come from: arrays [B], and [S] for the spans of weight versions.

    seeds            int64, of the request; -1 if the engine does not tell
    weight_versions  int64, the oldest version that produced a token
    scores, penalties, accs   float64; see types.Score
    finish_reasons   int64, index into FINISH_REASONS
    span_samples, span_starts, span_versions   int64 [S]: from token span_starts of its response on, version span_versions has
                     produced sample span_samples. Every sample has at least one span.
    """

    seeds: np.ndarray
    weight_versions: np.ndarray
    scores: np.ndarray
    penalties: np.ndarray
    accs: np.ndarray
    finish_reasons: np.ndarray
    span_samples: np.ndarray
    span_starts: np.ndarray
    span_versions: np.ndarray

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Origins:
        """Return the origins of the samples of `groups`, in the order of to_train_batch."""
        samples = [sample for group in groups for sample in group.samples]
        rollouts, scores = [sample.rollout for sample in samples], [sample.score for sample in samples]
        spans = [
            (number, start, version)
            for number, rollout in enumerate(rollouts)
            for start, version in (rollout.version_spans or ((0, rollout.weight_version),))
        ]
        span_samples, span_starts, span_versions = np.array(spans, np.int64).reshape(-1, 3).T
        return cls(
            seeds=np.array([-1 if rollout.seed is None else rollout.seed for rollout in rollouts], np.int64),
            weight_versions=np.array([rollout.weight_version for rollout in rollouts], np.int64),
            scores=np.array([score.score for score in scores], np.float64),
            penalties=np.array([score.penalty for score in scores], np.float64),
            accs=np.array([score.acc for score in scores], np.float64),
            finish_reasons=np.array([FINISH_REASONS.index(r.finish_reason) for r in rollouts], np.int64),
            span_samples=np.ascontiguousarray(span_samples),
            span_starts=np.ascontiguousarray(span_starts),
            span_versions=np.ascontiguousarray(span_versions),
        )


@dataclass(frozen=True, slots=True)
class Sources:
    """Where a batch comes from: its prompts, by group number, and the origins of its samples."""

    prompts: list[PromptRecord]
    origins: Origins

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Sources:
        prompts = [PromptRecord(group.prompt.uid, group.prompt.row) for group in groups]
        return cls(prompts, Origins.of(groups))


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """What a rollout step trained on: `batch` as scatter_step takes it, and the origins of its samples."""

    batch: TrainBatch
    origins: Origins


def record_folder(run_dir: Path) -> Path:
    return run_dir / "record"


def step_folder(run_dir: Path, step: int) -> Path:
    return record_folder(run_dir) / f"step_{step:06d}"


def recorded_steps(run_dir: Path) -> list[int]:
    """Return the steps that are recorded, in order."""
    folder = record_folder(run_dir)
    return sorted(step_of(path) for path in folder.iterdir() if is_name(path.name)) if folder.is_dir() else []


def recorded_starts(run_dir: Path) -> list[int]:
    """Return the steps that the run's starts went on from, in order."""
    names = (path.parent.name.removeprefix(_START) for path in record_folder(run_dir).glob(f"{_START}*/{START_FILE}"))
    return sorted(int(name) for name in names if name.isdecimal())  # the folder of an unfinished one has a longer name


def has_batch(run_dir: Path, step: int) -> bool:
    return (step_folder(run_dir, step) / BATCH_FILE).is_file()


def config_path(run_dir: Path, after_step: int) -> Path:
    """Return the configuration of the start that went on from `after_step`. Raise RecordError if it is damaged."""
    return _checked(_start_folder(run_dir, after_step) / CONFIG_FILE)


def forget_after(run_dir: Path, step: int) -> None:
    """Delete the records of later steps and starts: the run goes on from `step`, and makes its own."""
    for later in recorded_steps(run_dir):
        if later > step:
            remove(step_folder(run_dir, later))
    for start in recorded_starts(run_dir):
        if start >= step:
            remove(_start_folder(run_dir, start))


def write_start(run_dir: Path, record: StartRecord, config: str) -> None:
    """Write the record of a start, with the configuration as YAML."""
    folder = _start_folder(run_dir, record.after_step)
    partial = new_partial(folder)
    (partial / CONFIG_FILE).write_text(config, encoding="utf-8")
    (partial / START_FILE).write_text(_to_json(record), encoding="utf-8")
    _publish(partial, folder)


def write_batch(run_dir: Path, step: int, record: BatchRecord) -> Path:
    """Write a step's batch into a new folder, and return the folder for `write_step`. Host memory: none for each token."""
    folder = new_partial(step_folder(run_dir, step))
    arrays = {name: torch.from_numpy(array) for name, array in _arrays(record).items()}
    file = SafetensorsWriter(
        folder / BATCH_FILE, {name: TensorInfo(array.dtype, tuple(array.shape)) for name, array in arrays.items()}
    )
    for name, array in arrays.items():
        file.write(name, array)
    file.close()
    return folder


def write_step(run_dir: Path, record: StepRecord, partial: Path | None = None) -> None:
    """Publish a step's record at once: in the folder of `write_batch`, or without its batch. Replace an earlier one."""
    folder = step_folder(run_dir, record.step)
    partial = partial or new_partial(folder)
    (partial / STEP_FILE).write_text(_to_json(record), encoding="utf-8")
    _publish(partial, folder)


def drop_batches(run_dir: Path, newest: int, keep: int) -> None:
    """Delete the batches of all but the `keep` steps up to `newest`."""
    for step in recorded_steps(run_dir):
        if step <= newest - keep:
            (step_folder(run_dir, step) / BATCH_FILE).unlink(missing_ok=True)


def read_start(run_dir: Path, step: int) -> StartRecord:
    """Return the record of the start that rollout step `step` belongs to."""
    before = [start for start in recorded_starts(run_dir) if start < step]
    if not before:
        raise RecordError(_why_no_start(run_dir, step))
    return _read(StartRecord, _start_folder(run_dir, before[-1]) / START_FILE)


def _why_no_start(run_dir: Path, step: int) -> str:
    if step < 1:
        return f"rollout steps begin at 1, got {step}"
    if not run_dir.is_dir():
        return f"there is no run in {run_dir}; give the folder of a run with observe.record true"
    return f"{run_dir} has no record of a start before rollout step {step}; records need observe.record true when the run is made"


def read_step(run_dir: Path, step: int) -> StepRecord:
    """Return the record of a rollout step. Raise RecordError if there is none, or if it is damaged."""
    path = step_folder(run_dir, step) / STEP_FILE
    if not path.is_file():
        raise RecordError(f"{run_dir} has no record of rollout step {step}; {_those_there(run_dir)}")
    return _read(StepRecord, path)


def read_batch(run_dir: Path, step: int) -> BatchRecord:
    """Return the batch of a rollout step. Raise RecordError if there is none any more, or if it is damaged."""
    path = step_folder(run_dir, step) / BATCH_FILE
    if not path.is_file():
        kept = [str(number) for number in recorded_steps(run_dir) if has_batch(run_dir, number)]
        raise RecordError(
            f"{run_dir} has no batch of rollout step {step} (observe.record_keep); those of steps {', '.join(kept) or 'none'} "
            "are there"
        )
    try:
        file = SafetensorsFile(_checked(path))
        arrays = {name: file.read(name).numpy() for name in file.tensors}
        file.close()
    except CheckpointError as error:
        raise RecordError(str(error)) from error
    if missing := [name for name in (*_names(TrainBatch), *_names(Origins)) if name not in arrays]:
        raise RecordError(f"{path} lacks {', '.join(missing)}; another version wrote it: use that one")
    arrays["accs"] = arrays["accs"].astype(np.float64)  # earlier versions wrote bools
    return BatchRecord(
        TrainBatch(**{name: arrays[name] for name in _names(TrainBatch)}),
        Origins(**{name: arrays[name] for name in _names(Origins)}),
    )


def _those_there(run_dir: Path) -> str:
    steps = recorded_steps(run_dir)
    if not steps:
        return "it was not run with observe.record true"
    return f"it has those of {len(steps)} steps from {steps[0]} to {steps[-1]}"


def _start_folder(run_dir: Path, after_step: int) -> Path:
    return record_folder(run_dir) / f"{_START}{after_step:06d}"


def _arrays(record: BatchRecord) -> dict[str, np.ndarray]:
    parts = (record.batch, record.origins)
    return {name: getattr(part, name) for part in parts for name in _names(type(part))}


def _names(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]


def _to_json(record: Any) -> str:
    return json.dumps(asdict(record))  # Python writes a float's shortest form that reads back to the same bits, and NaN


def _publish(partial: Path, folder: Path) -> None:
    """Hash the files of a folder, and give it its name once all of it is on disk. Replace an earlier folder."""
    write_manifest(partial, list(partial.iterdir()), {})
    for path in (*partial.iterdir(), partial):
        sync_to_disk(path)
    remove(folder)
    os.rename(partial, folder)
    sync_to_disk(folder.parent)


def _checked(path: Path) -> Path:
    """Return the path. Raise RecordError if the file is missing, or is not bit for bit what was recorded."""
    try:
        check_manifest(path.parent, only=path.name)
    except (CheckpointError, OSError) as error:
        raise RecordError(f"{error}; {_REMEDY}") from error
    return path


def _read(kind: type[T], path: Path) -> T:
    try:
        return _adapter(kind).validate_json(_checked(path).read_bytes(), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its content"
        raise RecordError(f"{path}: {where}: {first['msg']}; another version wrote it: use that one") from None


@cache
def _adapter(kind: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(kind)
