"""The configuration of a run: its settings, which keep the rules. Reading files is file.py.

Change here: nothing; a new section goes to settings.py, a rule to rules.py.
"""

from __future__ import annotations

from pydantic import model_validator

from dapo_mcore.config.rules import RULES
from dapo_mcore.config.settings import Settings
from dapo_mcore.config.units import in_one_unit


class Config(Settings):
    """One training run, in the units of its stages. Raise ValueError, which pydantic collects, for the first broken rule between
    sections."""

    @model_validator(mode="after")
    def _check_across_sections(self) -> Config:
        for name, section in in_one_unit(self).items():
            object.__setattr__(self, name, section)  # nobody has seen the frozen record yet
        for rule in RULES:
            rule(self)
        return self
