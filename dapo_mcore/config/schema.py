"""The configuration of a run: its settings, which keep the rules. Reading files is file.py.

Change here: nothing; a new section goes to settings.py, a rule to rules.py.
"""

from __future__ import annotations

from pydantic import model_validator

from dapo_mcore.config.rules import RULES
from dapo_mcore.config.settings import Settings


class Config(Settings):
    """One training run. Raise ValueError, which pydantic collects, for the first broken rule between sections."""

    @model_validator(mode="after")
    def _check_across_sections(self) -> Config:
        for rule in RULES:
            rule(self)
        return self
