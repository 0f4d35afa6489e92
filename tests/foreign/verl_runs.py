"""Runs of verl as their reader returns them, from a few settings, for the tests of its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dapo_mcore.foreign.convert import Conversion, convert
from dapo_mcore.foreign.settings import ForeignRun, ForeignSetting
from dapo_mcore.foreign.tables.verl import VERL

A, R, M = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"
GRPO: dict[str, Any] = {
    "algorithm.adv_estimator": "grpo", f"{R}.n": 8, f"{M}.path": "models/m", "data.train_files": "train.parquet",
}  # fmt: skip
"""The estimator, so that no critic is wanted, the group that it needs, and what a run cannot be without."""


def verl_run(settings: dict[str, Any], entry: str = "verl.trainer.main_ppo", config: str = "") -> ForeignRun:
    """Return a run whose settings are in lines 1, 2, … of run.sh."""
    lines = [ForeignSetting(key, value, f"run.sh line {line}") for line, (key, value) in enumerate(settings.items(), 1)]
    return ForeignRun("verl", Path("run.sh"), entry, config, tuple(lines))


def imported(settings: dict[str, Any], entry: str = "verl.trainer.main_ppo", config: str = "") -> Conversion:
    """Return the conversion of such a run."""
    return convert(verl_run(settings, entry, config), VERL)


def ours(settings: dict[str, Any], entry: str = "verl.trainer.main_ppo", config: str = "") -> dict[str, Any]:
    """Return {our key: value} of such a run, with `GRPO` unless it names an estimator."""
    return {key: value for key, (value, _) in imported({**GRPO, **settings}, entry, config).values().items()}


def lost(settings: dict[str, Any], entry: str = "verl.trainer.main_ppo") -> dict[str, bool]:
    """Return the lost settings, and whether each changes the objective."""
    return imported({**GRPO, **settings}, entry).losses


def asked(settings: dict[str, Any], entry: str = "verl.trainer.main_ppo") -> list[str]:
    """Return our keys that a person must decide."""
    return list(imported({**GRPO, **settings}, entry).asked)
