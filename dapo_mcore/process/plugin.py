"""Users' functions by import path: `package.module:function` or `path/to/file.py:function`.

Change here: how a function is found. The sections of the configuration that name one say how it is called.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from dapo_mcore.errors import DapoError, describe_error
from dapo_mcore.process.ray_cluster import without_ray
from dapo_mcore.process.signals import Interrupted


def load_function(spec: str, key: str, built_in: str, error_type: type[DapoError]) -> Callable[..., Any]:
    """Return the function, or the class. Raise `error_type` if it cannot be loaded.

    key       the configuration's name for it, for errors.
    built_in  the words that the key takes besides import paths, for errors.
    """
    place, separator, name = spec.rpartition(":")
    if not separator or not place or not name:
        raise error_type(
            f"{key} {spec!r} is neither {built_in} nor an import path; "
            f"write package.module:function or path/to/file.py:function"
        )
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Interrupted:
        raise
    except BaseException as error:  # the user's module may raise anything
        raise error_type(f"{key} {spec!r}: {place} cannot be imported: {describe_error(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        own = (
            name
            for name, value in inspect.getmembers(module, inspect.isfunction)
            if value.__module__ == module.__name__
        )
        raise error_type(
            f"{key} {spec!r}: {place} has no function {name!r}; its functions are: {', '.join(own) or 'none'}"
        )
    return function


def parameters_of(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the function's parameters; **kwargs if it has no signature, as some C functions."""
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return [inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)]


def plugin_environment() -> dict[str, str]:
    """Return the environment of a process for a user's function: ours with our import path, and one thread, so that such
    processes do not compete for cores.

    The token of a Ray cluster is removed: these functions handle text that a model wrote.
    """
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    return {"OMP_NUM_THREADS": "1", **without_ray(dict(os.environ)), "PYTHONPATH": path}


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path.absolute()}")
    spec = importlib.util.spec_from_file_location(f"plugin_{path.stem}", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    return module
