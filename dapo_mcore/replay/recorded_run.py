"""A run's records by rollout step, whatever start of the run they belong to.

Change here: how a step finds its start, its settings and the weights it began with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dapo_mcore.config.file import load_config
from dapo_mcore.config.schema import Config
from dapo_mcore.errors import ConfigError, RecordError
from dapo_mcore.replay.record import (
    Digests,
    StartRecord,
    config_path,
    read_start,
    read_step,
    recorded_starts,
    recorded_steps,
)

_NAMES_OF_THE_RUN = ("name", "output_dir")


class RecordedRun:
    """The records in a run's folder. Each start is read once."""

    def __init__(self, path: Path):
        self.path, self.steps = path, recorded_steps(path)
        self._starts: dict[int, StartRecord] = {}

    def starts_before(self, step: int) -> list[int]:
        """Return the steps after which the starts until rollout step `step` went on, in order."""
        return [after for after in recorded_starts(self.path) if after < step]

    def start(self, step: int) -> StartRecord:
        """Return the start that a rollout step belongs to. Raise RecordError if there is none."""
        record = self._starts.get(next(reversed(self.starts_before(step)), -1)) or read_start(self.path, step)
        return self._starts.setdefault(record.after_step, record)

    def begins_at(self, step: int) -> bool:
        """Return True if a start of the run begins with this step."""
        return self.start(step).after_step == step - 1

    def weights_before(self, step: int) -> Digests | None:
        """Return the weights that a step began with; None if no record has them."""
        if self.begins_at(step):
            return self.start(step).weights
        return read_step(self.path, step - 1).weights if step - 1 in self.steps else None

    def settings(self, step: int) -> dict[str, Any]:
        """Return the configuration that held in a step, and the layout, packages, devices and flags."""
        return read_settings(self._config_file(step)) | asdict(self.start(step).setting)

    def config(self, step: int) -> Config:
        """Return the configuration that held in a step. Raise ConfigError if this version cannot read it."""
        return load_config(self._config_file(step))

    def _config_file(self, step: int) -> Path:
        return config_path(self.path, self.start(step).after_step)


Runs = tuple[RecordedRun, RecordedRun]


def read_settings(path: Path) -> dict[str, Any]:
    """Return a configuration as it is written, also one of another version. Raise RecordError if it cannot be read."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecordError(f"{path} cannot be read: {str(error).splitlines()[0]}; it is damaged") from None
    if not isinstance(tree, Mapping):
        raise RecordError(f"{path} is damaged: it holds no settings")
    return dict(tree)


class Difference(NamedTuple):
    """A setting and its values in both runs; None where a run has no such setting."""

    name: str
    a: Any
    b: Any


def setting_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """Return the leaves of two nested mappings that differ, with dotted names, in the order of the mappings."""
    flat = dict(_leaves(a)), dict(_leaves(b))
    names = [name for name in dict.fromkeys((*flat[0], *flat[1])) if name not in _NAMES_OF_THE_RUN]
    pairs = [Difference(name, *(tree.get(name) for tree in flat)) for name in names]
    return [pair for pair in pairs if pair.a != pair.b]


def changed_keys(before: Path, config: Config) -> str:
    """Return a clause with the keys that an earlier configuration sets otherwise: ` in seed, optimizer.lr`; empty if there is none, or
    it is damaged."""
    try:
        changed = setting_differences(_with_defaults(before), config.model_dump(mode="json"))
    except RecordError:
        return ""
    return f" in {', '.join(own.name for own in changed)}" if changed else ""


def _with_defaults(path: Path) -> dict[str, Any]:
    """Return a written configuration with the defaults of keys that its version did not have, if this version can read it."""
    try:
        return load_config(path).model_dump(mode="json")
    except ConfigError:
        return read_settings(path)


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
