"""The part of a checkpoint that is not tensors: the position of the run, and the settings that a resuming run must share.

Change here: the fields, and the number of the format when a reader must know of a change.

    state.json          TrainState but its arrays; `format`, `fits`, `reference`, `adam_step`, `guard`, `critic`, `entropy_coef`
    state.safetensors   token data of carried groups
"""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import safetensors.numpy
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from safetensors import SafetensorError

from dapo_mcore.errors import CheckpointError, DamagedCheckpoint

FORMAT = 3
"""1, unnumbered: optimizer state as megatron-core 0.16.1 stores it, Adam's steps in common.pt. 2: in blocks of our own. 3: in
shards, with a manifest."""

STATE_FILE, ARRAYS_FILE = "state.json", "state.safetensors"


@dataclass(frozen=True, slots=True)
class TrainState:
    """The position of a run, without its tensors.

    step            rollout steps done.
    num_updates     gradient steps done.
    weight_version  version of the weights that the engines held.
    loader          PromptLoader.state(): {epoch: 0, offset: 512, order: {…}}.
    sampler, sampler_arrays   Sampler.state(): the carried groups. The arrays are read on rank 0 alone, empty elsewhere.
    config          the configuration as YAML, for people to compare.
    """

    step: int
    num_updates: int
    weight_version: int
    loader: dict[str, Any]
    sampler: dict[str, Any]
    sampler_arrays: dict[str, np.ndarray]
    config: str


@dataclass(frozen=True, slots=True)
class RunState:
    """The content of the two files.

    format      number of the checkpoint's format
    train       the arrays are in state.safetensors
    fits        settings that must match between a checkpoint and the run that loads it; the parallel layout may differ
    reference   True if the checkpoint holds a reference policy
    adam_step   updates that Adam has made; None in format 1
    guard       counts and norms of actor/update_guard.py; None in checkpoints of earlier versions
    critic      adam_step and guard of the critic; None without one
    entropy_coef   value and use of algo.adaptive_entropy's coefficient; None without it
    """

    format: int
    train: TrainState
    fits: dict[str, Any]
    reference: bool
    adam_step: float | None
    guard: dict[str, Any] | None = None
    critic: dict[str, Any] | None = None
    entropy_coef: dict[str, Any] | None = None


def _file_model() -> type[BaseModel]:
    """Return the schema of state.json, by TrainState's own fields."""
    hints = get_type_hints(TrainState)
    stored = [field for field in fields(TrainState) if field.name != "sampler_arrays"]
    entries = {f.name: (hints[f.name], ... if f.default is MISSING else f.default) for f in stored}
    strict = ConfigDict(strict=True)
    train = create_model("train", __config__=strict, **entries)
    return create_model(
        "state",
        __config__=strict,
        format=(int, 1),
        train=(train, ...),
        fits=(dict[str, Any], ...),
        reference=(bool, ...),
        adam_step=(float | None, None),
        guard=(dict[str, Any] | None, None),
        critic=(dict[str, Any] | None, None),
        entropy_coef=(
            create_model("entropy_coef", __config__=strict, value=(float, ...), enabled=(bool, ...)) | None,
            None,
        ),
    )


_StateFile = _file_model()


def write_state(folder: Path, state: RunState) -> None:
    """Write both files. Raises OSError where the disk does not take them."""
    names = [field.name for field in fields(TrainState) if field.name != "sampler_arrays"]
    stored = {field.name: getattr(state, field.name) for field in fields(RunState)}
    stored["train"] = {name: getattr(state.train, name) for name in names}
    (folder / STATE_FILE).write_text(json.dumps(stored, indent=2), encoding="utf-8")
    (folder / ARRAYS_FILE).write_bytes(safetensors.numpy.save(state.train.sampler_arrays))


def read_state(folder: Path) -> RunState:
    """Read both files. Raises CheckpointError for a missing or damaged file, and for a format that this code cannot read."""
    path = folder / STATE_FILE
    try:
        content = json.loads(path.read_bytes())
        if isinstance(content, dict) and isinstance(number := content.get("format"), int) and number > FORMAT:
            raise CheckpointError(
                f"{folder} has format {number}, and this version of dapo_mcore reads up to {FORMAT}; resume with the "
                f"version that wrote it, or a newer one"
            )
        stored = _StateFile.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its content"
        raise DamagedCheckpoint(f"{path} is damaged: {where}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path} is damaged: {error}") from error
    train = TrainState(**dict(stored.train), sampler_arrays=_read_arrays(folder / ARRAYS_FILE))
    rest = (stored.adam_step, stored.guard, stored.critic, stored.entropy_coef and dict(stored.entropy_coef))
    return RunState(stored.format, train, stored.fits, stored.reference, *rest)


def refuse_wrong_optimizer_state(folder: Path, state: RunState) -> None:
    """Raise CheckpointError for an unnumbered checkpoint whose optimizer state megatron-core may have written wrongly.

    It did where a bucket before the last one is padded: with tied embeddings on several stages, where the embedding has
    a bucket of its own.
    """
    if state.format > 1 or not (state.fits.get("optimizer.distributed") and state.fits.get("tied")):
        return
    try:
        stages = yaml.safe_load(state.train.config)["parallel"]["pipeline_parallel"]
    except (yaml.YAMLError, KeyError, TypeError):
        stages = "unknown"
    if stages != 1:
        raise CheckpointError(
            f"{folder} has no format number: an earlier version wrote it, with tied embeddings, optimizer.distributed and "
            f"parallel.pipeline_parallel {stages}, and so its optimizer state is wrong; its weights are right: start a new "
            f"run from them with model.path={folder}"
        )


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(path)
    except SafetensorError as error:
        raise DamagedCheckpoint(f"{path} is truncated or damaged: {error}") from error
