"""Runs of NeMo-RL as their reader returns them, from a few keys, for the tests of its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dapo_mcore.foreign.convert import Conversion, convert
from dapo_mcore.foreign.read.nemo import BASE
from dapo_mcore.foreign.settings import ForeignRun, ForeignSetting
from dapo_mcore.foreign.tables.nemo import NEMO


def imported(settings: dict[str, Any], config: str = BASE, file: Path = Path("run.yaml")) -> Conversion:
    """Return the conversion of a run that inherits from NeMo-RL's file of defaults, or with config "" from nothing."""
    found = tuple(ForeignSetting(key, value, file.name) for key, value in settings.items())
    return convert(ForeignRun("nemo", file, "", config, found), NEMO)


def ours(settings: dict[str, Any]) -> dict[str, Any]:
    """Return {our key: value} of such a run."""
    return {key: value for key, (value, _) in imported(settings).values().items()}
