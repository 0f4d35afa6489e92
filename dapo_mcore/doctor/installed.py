"""What this Python environment has: distributions, modules, and what importing one of them gives.

Change here: how an environment is asked. Nothing is imported in this process.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dapo_mcore.doctor import probe
from dapo_mcore.errors import shortened

_TIMEOUT_S = 180
_LONGEST_ERROR = 200


@dataclass(frozen=True)
class Import:
    """The outcome of importing a module in a process of its own.

    error        None if it worked
    facts        what the module says of itself, see probe.py
    cudnn_files  the cuDNN libraries that the process had loaded then
    """

    error: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    cudnn_files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Installed:
    """An environment, as functions, so that tests can hand in another one.

    version      of a distribution, None if it is not installed
    has          True if a module, such as `amp_C`, is found
    try_import   the outcome of importing a module
    """

    version: Callable[[str], str | None]
    has: Callable[[str], bool]
    try_import: Callable[[str], Import]


def this_environment() -> Installed:
    return Installed(version, has_module, try_import)


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def has_module(name: str) -> bool:
    """Return True if the module is found. Of `a.b` it looks for a file of b in a's folder: finding it would import a."""
    top, *below = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):  # a module that is loaded, but without a spec
        return False
    if spec is None or not below:
        return spec is not None
    places = [Path(folder, *below) for folder in spec.submodule_search_locations or ()]
    return any(place.is_dir() or place.with_suffix(".py").is_file() for place in places)


def try_import(module: str) -> Import:
    """Import the module in another process of this interpreter, which may crash."""
    command = [sys.executable, "-P", str(Path(probe.__file__)), module]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
        report = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return Import(f"the import does not end within {_TIMEOUT_S} s")
    except (OSError, ValueError, IndexError) as error:
        return Import(_death(done.returncode, done.stderr) if not isinstance(error, OSError) else str(error))
    error, files = report.pop("error"), tuple(report.pop("cudnn_files"))
    return Import(error and shortened(" ".join(error.split()), _LONGEST_ERROR), report, files)


def _death(status: int, stderr: str) -> str:
    words = (stderr.strip().splitlines() or ["it wrote nothing"])[-1]
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
    return f"the import ends the process {how}: {shortened(words, _LONGEST_ERROR)}"
