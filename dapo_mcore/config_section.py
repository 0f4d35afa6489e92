"""What every section of the configuration is: frozen, and closed to unknown keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of every section: unknown keys fail, values cannot be changed after validation."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
