"""The interpreter that runs servers, and the SGLang that it has.

Change here: what is asked of it before a server starts. It may be of another environment, so installed.py runs there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from dapo_mcore.config.sglang import SGLangConfig
from dapo_mcore.errors import ConfigError
from dapo_mcore.rollout.sglang.client.versions import check_version, parse_version
from dapo_mcore.rollout.sglang.launch import installed
from dapo_mcore.rollout.sglang.launch.options import check_names

_TIMEOUT_S = 120


@dataclass(frozen=True)
class Installed:
    """models: names of SGLang's model modules. options: its server's, as installed.py tells them."""

    models: list[str]
    options: dict[str, str]


def python_of(settings: SGLangConfig) -> str:
    """A relative path counts from here, wherever the server runs; its links stay: they make an environment."""
    given = settings.python or sys.executable
    return os.path.abspath(given) if os.sep in given else given


def inspect_environment(settings: SGLangConfig, resumes: bool = False) -> Installed:
    """What the interpreter has, in a second; `resumes` as of versions.check_version.

    Raises ConfigError when it has no SGLang, or too old a one, or `server_args` names options that this one lacks.
    """
    python = python_of(settings)
    told = _ask(python)
    if told["version"] is None:
        raise ConfigError(f"{python} has no SGLang; {_REMEDY}")
    check_version(parse_version(told["version"]), python, resumes)
    options = told["options"]
    if not settings.server_args.keys() <= options.keys():
        options |= _ask(python, "--registered")["options"]
    check_names(settings.server_args, options, f"SGLang {told['version']} of {python}")
    return Installed(told["models"], options)


_REMEDY = "give the interpreter of an environment that has it as rollout.sglang.python"


def _ask(python: str, *arguments: str) -> dict[str, object]:
    command = [python, "-P", str(Path(installed.__file__)), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, cwd="/")
        return json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{python} cannot be asked for SGLang: {error}; {_REMEDY}") from error
    except (ValueError, IndexError) as error:
        words = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
        raise ConfigError(f"{python} cannot be asked for SGLang: {words}; {_REMEDY}") from error
