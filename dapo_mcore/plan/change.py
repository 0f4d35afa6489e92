"""A configuration with a few settings replaced, if its rules allow them.

Change here: how a plan tries a setting.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from dapo_mcore.config.schema import RULES, Config
from dapo_mcore.errors import ConfigError
from dapo_mcore.plan.job import Job, place

Changes = Mapping[str, Any]
"""Values by dotted key."""


def changed(job: Job, changes: Changes) -> Job | None:
    """Return the job with these settings on the same GPUs; None if a rule refuses them."""
    try:
        config = _with(job.config, changes)
        gpus = job.num_train + job.num_servers
        return place(config, job.architecture, job.shape, job.flops, job.cluster, job.assume, gpus=gpus)
    except (ValueError, ConfigError):  # pydantic's ValidationError is a ValueError
        return None


def _with(config: Config, changes: Changes) -> Config:
    """Return the configuration with other values. Raises ValueError if a rule refuses them. Only changed sections are built anew."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, _, rest = key.partition(".")
        tree = sections.setdefault(section, getattr(config, section).model_dump())
        *parents, leaf = rest.split(".")
        for parent in parents:
            tree = tree[parent]
        tree[leaf] = value
    built = {name: type(getattr(config, name)).model_validate(tree) for name, tree in sections.items()}
    copied = config.model_copy(update=built)
    for rule in RULES:
        rule(copied)
    return copied


def overrides(changes: Changes) -> list[str]:
    """Return the changes as overrides of the command line, quoted for a shell."""
    return [shlex.quote(f"{key}={_text(value)}") for key, value in changes.items()]


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_text(own)}" for key, own in value.items()) + "}"
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)
