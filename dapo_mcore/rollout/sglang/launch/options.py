"""`rollout.sglang.server_args` as a command line: names held against SGLang's own options, values in its spelling.

Change here: how a value of the configuration is written as an option. Which options there are is installed.py's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from dapo_mcore.errors import ConfigError


def command_line(values: Mapping[str, Any], kinds: Mapping[str, str]) -> list[str]:
    """`values` by option, without dashes, as arguments; null leaves an option to SGLang. `kinds` as of installed.py.

    Raises ConfigError for a value that its option cannot take.
    """
    given = {name: value for name, value in values.items() if value is not None}
    return [word for name, value in given.items() for word in _words(name, value, kinds[name])]


def check_names(names: Iterable[str], kinds: Mapping[str, str], where: str) -> None:
    """Nothing; raises ConfigError for names that are no options of the SGLang that `where` tells."""
    unknown = [name for name in names if name not in kinds]
    if not unknown:
        return
    near = {name: get_close_matches(name, kinds, n=3) or [k for k in kinds if name in k][:3] for name in unknown}
    asked = "; ".join(f"{name}: {' or '.join(found) or 'nothing like it'}" for name, found in near.items())
    raise ConfigError(
        f"rollout.sglang.server_args holds {', '.join(unknown)}, but {where} has no such options; the nearest ones: {asked}"
    )


def _words(name: str, value: Any, kind: str) -> list[str]:
    if kind in ("flag", "pair"):
        if not isinstance(value, bool):
            raise ConfigError(f"rollout.sglang.server_args: {name} takes true or false, not {value!r}")
        return [f"--{name}"] if value else [f"--no-{name}"] * (kind == "pair")
    if isinstance(value, list) and kind == "many":
        return [f"--{name}", *map(_written, value)] if value else []
    return [f"--{name}={_written(value)}"]  # joined, so that a value may begin with a dash


def _written(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | list | dict) else str(value)
