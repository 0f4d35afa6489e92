"""Reward functions by name: the built-in rule, or a function by import path behind the convention it was written for.

Change here: another built-in rule, or another calling convention.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from dapo_mcore.errors import RewardError
from dapo_mcore.reward import math_answer
from dapo_mcore.reward.attempt import Attempt, Judge


def build_judge(function: str, adapter: str, strict_box: bool) -> Judge:
    """The reward function of the configuration as a Judge. Raises RewardError when it cannot be loaded."""
    if function == "math_dapo":
        return lambda attempt: math_answer.compute_score(attempt.response, attempt.answer, strict_box)
    return {"verl": as_verl, "trl": as_trl}[adapter](load_function(function))


def load_function(spec: str) -> Callable[..., Any]:
    """The function that `package.module:function` or `path/to/file.py:function` names. Raises RewardError."""
    place, separator, name = spec.rpartition(":")
    if not separator or not place or not name:
        raise RewardError(
            f"reward.function {spec!r} is neither math_dapo nor an import path; "
            f"write package.module:function or path/to/file.py:function"
        )
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as error:  # whatever the user's module does while it is imported
        raise RewardError(
            f"reward.function {spec!r}: {place} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        own = (
            name
            for name, value in inspect.getmembers(module, inspect.isfunction)
            if value.__module__ == module.__name__
        )
        raise RewardError(
            f"reward.function {spec!r}: {place} has no function {name!r}; its functions are: {', '.join(own) or 'none'}"
        )
    return function


def as_verl(function: Callable[..., Any]) -> Judge:
    """Calls `compute_score(data_source, solution_str, ground_truth, extra_info)`.

    extra_info is the row's own extra_info column when it has one, else all its remaining columns.
    """

    def judge(attempt: Attempt) -> Any:
        extra_info = attempt.extra.get("extra_info")
        return function(
            data_source=attempt.source,
            solution_str=attempt.response,
            ground_truth=attempt.answer,
            extra_info=dict(extra_info if isinstance(extra_info, Mapping) else attempt.extra),
        )

    return judge


def as_trl(function: Callable[..., Any]) -> Judge:
    """Calls `f(completions, **columns)` with lists of one and takes the one number of the list it returns.

    The answer is offered as `answer` and `ground_truth`. A function without **kwargs gets the columns it names.
    """
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    names = {parameter.name for parameter in parameters}

    def judge(attempt: Attempt) -> Any:
        columns = {
            **attempt.extra,
            "prompts": attempt.prompt,
            "completions": attempt.response,
            "completion_ids": attempt.token_ids.tolist(),
            "answer": attempt.answer,
            "ground_truth": attempt.answer,
            "data_source": attempt.source,
        }
        scores = function(**{name: [value] for name, value in columns.items() if takes_all or name in names})
        if len(scores) != 1:
            raise ValueError(f"the reward function gave {len(scores)} scores for 1 completion")
        return scores[0]

    return judge


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path.absolute()}")
    spec = importlib.util.spec_from_file_location(f"reward_plugin_{path.stem}", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module
