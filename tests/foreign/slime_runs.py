"""Runs of slime as their reader returns them, from a few flags, for the tests of its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dapo_mcore.foreign.convert import Conversion, convert
from dapo_mcore.foreign.settings import ForeignRun, ForeignSetting
from dapo_mcore.foreign.tables.slime import SLIME

LEAST: dict[str, Any] = {
    "hf-checkpoint": "/m", "prompt-data": "/d.jsonl", "num-rollout": 5, "rollout-batch-size": 8, "rollout-max-response-len": 1000,
    "colocate": True, "rm-type": "dapo", "attention-dropout": 0.0, "hidden-dropout": 0.0,
}  # fmt: skip
"""What every script of slime says."""


def imported(flags: dict[str, Any], entry: str = "train.py") -> Conversion:
    """Return the conversion of a run whose flags are in lines 1, 2, … of run.sh."""
    given = {key: value for key, value in {**LEAST, **flags}.items() if value is not None}
    lines = [ForeignSetting(key, value, f"run.sh line {line}") for line, (key, value) in enumerate(given.items(), 1)]
    return convert(ForeignRun("slime", Path("run.sh"), entry, "", tuple(lines)), SLIME)


def ours(flags: dict[str, Any], entry: str = "train.py") -> dict[str, Any]:
    """Return {our key: value} of such a run."""
    return {key: value for key, (value, _) in imported(flags, entry).values().items()}
