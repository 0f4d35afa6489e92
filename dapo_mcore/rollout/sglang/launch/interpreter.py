"""The interpreter that runs servers: which SGLang it has, and `server_args` as a command line for that SGLang.

Change here: what is checked before a server starts, and how a value of the configuration is written as an option. The
interpreter may be in another environment, so installed.py runs there and reports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dapo_mcore.config.sglang import SGLangConfig
from dapo_mcore.errors import ConfigError
from dapo_mcore.rollout.sglang.client.versions import check_version, parse_version
from dapo_mcore.rollout.sglang.launch import installed

_TIMEOUT_S = 120


@dataclass(frozen=True)
class Installed:
    """models: names of SGLang's model modules. options: kind of each server option, see installed.declared_options."""

    models: list[str]
    options: dict[str, str]


def python_of(settings: SGLangConfig) -> str:
    """Return the interpreter's absolute path. Symbolic links stay: they make a virtual environment."""
    given = settings.python or sys.executable
    return os.path.abspath(given) if os.sep in given else given


def inspect_environment(settings: SGLangConfig, continues_requests: bool = False) -> Installed:
    """Return what the interpreter has; takes about a second. continues_requests  see versions.check_version.

    Raise ConfigError if it has no SGLang, or too old a one, or if `server_args` names options that this SGLang lacks.
    """
    python = python_of(settings)
    report = _ask(python)
    if report["version"] is None:
        raise ConfigError(f"{python} has no SGLang; {_REMEDY}")
    check_version(parse_version(report["version"]), python, continues_requests)
    options = report["options"]
    if not settings.server_args.keys() <= options.keys():
        options |= _ask(python, "--registered")["options"]
    check_names(settings.server_args, options, f"SGLang {report['version']} of {python}")
    return Installed(report["models"], options)


def version_of(python: str) -> str | None:
    """Return the version of the interpreter's SGLang, None without one. Raise ConfigError if it cannot be asked."""
    return _ask(python)["version"]


def command_line(values: Mapping[str, Any], kinds: Mapping[str, str]) -> list[str]:
    """Return options and their values as command-line arguments; a value of None leaves the option to SGLang.

    kinds  of the options, see installed.declared_options.
    Raise ConfigError for a value that its option cannot take.
    """
    given = {name: value for name, value in values.items() if value is not None}
    return [word for name, value in given.items() for word in _words(name, value, kinds[name])]


def check_names(names: Iterable[str], kinds: Mapping[str, str], where: str) -> None:
    """Raise ConfigError for names that are not options of the SGLang that `where` describes, with the nearest ones."""
    unknown = [name for name in names if name not in kinds]
    if not unknown:
        return
    near = {name: get_close_matches(name, kinds, n=3) or [k for k in kinds if name in k][:3] for name in unknown}
    asked = "; ".join(f"{name}: {' or '.join(found) or 'nothing like it'}" for name, found in near.items())
    raise ConfigError(
        f"rollout.sglang.server_args holds {', '.join(unknown)}, but {where} has no such options; the nearest ones: {asked}"
    )


_REMEDY = (
    "give the interpreter of an environment that has it as rollout.sglang.python, install it (pip install -e '.[sglang]'), or set "
    "rollout.engine embedded for a small model on a few processes"
)


def _ask(python: str, *arguments: str) -> dict[str, Any]:
    command = [python, "-P", str(Path(installed.__file__)), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, cwd="/")
        return json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{python} cannot be asked for SGLang: {error}; {_REMEDY}") from error
    except (ValueError, IndexError) as error:
        words = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
        raise ConfigError(f"{python} cannot be asked for SGLang: {words}; {_REMEDY}") from error


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
