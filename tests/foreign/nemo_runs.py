"""Runs of NeMo-RL as their reader returns them, from a few keys, for the tests of its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dapo_mcore.foreign.convert import Conversion, convert
from dapo_mcore.foreign.settings import ForeignRun, ForeignSetting
from dapo_mcore.foreign.tables.nemo import NEMO


def imported(settings: dict[str, Any]) -> Conversion:
    """Return the conversion of a run."""
    found = tuple(ForeignSetting(key, value, "run.yaml") for key, value in settings.items())
    return convert(ForeignRun("nemo", Path("run.yaml"), "", "", found), NEMO)


def ours(settings: dict[str, Any]) -> dict[str, Any]:
    """Return {our key: value} of such a run."""
    return {key: value for key, (value, _) in imported(settings).values().items()}
