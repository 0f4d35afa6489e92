"""Reward functions by name: the built-in graders, and users' functions by import path with their calling convention.

Change here: another built-in grader, or another calling convention.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from dapo_mcore.errors import RewardError, describe_error
from dapo_mcore.process.plugin import load_function, parameters_of
from dapo_mcore.reward import gsm8k, math_answer, math_boxed
from dapo_mcore.reward.attempt import Attempt, Judge
from dapo_mcore.reward.by_source import TABLE, rule_for

if TYPE_CHECKING:
    from dapo_mcore.config.reward import RewardConfig

_BUILT_IN: Mapping[str, Callable[..., Any]] = {
    "math_dapo": math_answer.compute_score,
    "gsm8k": gsm8k.compute_score,
    "math_boxed": math_boxed.compute_score,
}
"""Functions of (response, answer) that cannot hang."""
_VERL = ("data_source", "solution_str", "ground_truth", "extra_info")
_OF_TRLS_TRAINER = ("trainer_state", "log_extra", "log_metric", "environments")


@dataclass(frozen=True, slots=True)
class Rule:
    """Which reward function is called, and how. The fields are those of the section `reward`; processes get them as JSON."""

    function: str = "math_dapo"
    adapter: str = "verl"
    strict_box: bool = False
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    by_source: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, config: RewardConfig) -> Rule:
        """Return the rule of a section."""
        return cls(**{name: getattr(config, name) for name in cls.__dataclass_fields__})


def build_judge(rule: Rule, key: str = "reward.function") -> Judge:
    """Return the reward function as a Judge.

    key  the configuration's name for the function, for errors.
    Raise RewardError if it cannot be loaded, or does not take the arguments of its convention.
    """
    if rule.function == "by_source":
        return _by_source(rule)
    if rule.function == "math_verify":
        return _math_verify()
    if rule.function in _BUILT_IN:
        score = _BUILT_IN[rule.function]
        options = {"strict_box_verify": True} if rule.strict_box else {}
        return lambda attempt: score(attempt.response, attempt.answer, **options)
    words = ", ".join((*_BUILT_IN, "math_verify", "by_source"))
    loaded = load_function(rule.function, key, words, RewardError)
    try:
        return {"verl": as_verl, "trl": as_trl}[rule.adapter](loaded, rule.kwargs)
    except TypeError as error:
        raise RewardError(
            f"{key} {rule.function!r} cannot be called as reward.adapter {rule.adapter}: {error}"
        ) from error


def _by_source(rule: Rule) -> Judge:
    """Return a Judge that calls the rule of each attempt's source. All functions of both tables are loaded now."""
    patterns = {function: pattern for pattern, function in [*TABLE.items(), *rule.by_source.items()]}
    judges = {
        function: build_judge(replace(rule, function=function), f"reward.by_source.{pattern}")
        for function, pattern in patterns.items()
    }

    def judge(attempt: Attempt) -> Any:
        function = rule_for(attempt.source, rule.by_source)
        if function is None:
            raise ValueError(f"reward.by_source has no rule for the data source {attempt.source!r}")
        return judges[function](attempt)

    return judge


def _math_verify() -> Judge:
    try:
        from dapo_mcore.reward import equivalence
    except ImportError as error:
        raise RewardError(
            f"reward.function math_verify needs the package math-verify ({describe_error(error)}): pip install math-verify[antlr4_13_2]"
        ) from error
    return lambda attempt: equivalence.compute_score(attempt.response, attempt.answer)


def as_verl(function: Callable[..., Any], kwargs: Mapping[str, Any] | None = None) -> Judge:
    """Return a Judge that calls `compute_score(data_source, solution_str, ground_truth, extra_info, **kwargs)`, all by name.

    extra_info is the row's extra_info column if it has one, else all its columns but the prompt. As in verl it also has
    `num_turns`, which counts the prompt and what tools gave: 2 for one turn of the policy, 4 for two. A column of this name
    takes precedence. A function with a parameter `transcript` gets an attempt.Transcript. An `async def` is awaited.
    Raise TypeError if the function does not take these arguments, or needs more.
    """
    more = {parameter.name for parameter in parameters_of(function)} & {"transcript"}
    call = _to_its_end(_with_kwargs(function, kwargs or {}, (*_VERL, "transcript")))
    _check_call(function, (*_VERL, *more, *(kwargs or {})))

    def judge(attempt: Attempt) -> Any:
        column = attempt.extra.get("extra_info")
        columns = column if isinstance(column, Mapping) else attempt.extra
        transcript = attempt.full_transcript()
        return call(
            data_source=attempt.source,
            solution_str=attempt.response,
            ground_truth=attempt.answer,
            extra_info={"num_turns": 2 * transcript["num_turns"], **columns},
            **dict.fromkeys(more, transcript),
        )

    return judge


def as_trl(function: Callable[..., Any], kwargs: Mapping[str, Any] | None = None) -> Judge:
    """Return a Judge that calls `f(prompts, completions, completion_ids, **columns)` with lists of one sample, and with `kwargs`
    as they are, which take precedence over columns.

    The function returns a list with one number. None, with which TRL skips a sample, is a failure here.
    As in TRL's GRPOTrainer (0.2x to 1.16): if the row's prompt is a chat, `prompts` has its messages and `completions`
    `[{"role": "assistant", "content": …}]`, else both are text; each column of the row is a list with its own name; an
    `async def` is awaited. Different: text prompts are rendered, with data.prompt_template; the answer column has the
    answer after data.answer_pattern, which is also passed as `answer` and `ground_truth`; completions and completion_ids are
    what the policy wrote, without what tools gave; `transcript` is an attempt.Transcript; a function without **kwargs
    gets only the arguments that it names. TRL's trainer_state, log_extra, log_metric and environments do not exist here.
    Raise TypeError if the function takes no completions, or requires one of these four.
    """
    parameters = parameters_of(function)
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    names = {parameter.name for parameter in parameters}
    if not takes_all and "completions" not in names:
        raise TypeError("it takes neither completions nor **kwargs; for verl's convention set reward.adapter verl")
    if missing := [p.name for p in parameters if p.name in _OF_TRLS_TRAINER and p.default is p.empty]:
        raise TypeError(
            f"it needs {', '.join(missing)}, which only TRL's trainer has; give a default, for instance None"
        )
    kwargs = kwargs or {}
    if unknown := [] if takes_all else [name for name in kwargs if name not in names]:
        raise TypeError(f"reward.kwargs has {unknown[0]}, which it does not take")
    call = _to_its_end(_with_kwargs(function, kwargs, ("prompts", "completions", "completion_ids", "transcript")))

    def judge(attempt: Attempt) -> Any:
        columns = {name: value for name, value in _trl_columns(attempt).items() if name not in kwargs}
        scores = call(**{name: [value] for name, value in columns.items() if takes_all or name in names})
        if len(scores) != 1:
            raise ValueError(f"the reward function gave {len(scores)} scores for 1 completion")
        return scores[0]

    return judge


def _with_kwargs(function: Callable[..., Any], kwargs: Mapping[str, Any], ours: tuple[str, ...]) -> Callable[..., Any]:
    """Return the function with reward.kwargs. Raise TypeError for one that the run passes itself."""
    if taken := [name for name in kwargs if name in ours]:
        raise TypeError(f"reward.kwargs has {taken[0]}, which the run passes itself; give it another name")
    return partial(function, **kwargs) if kwargs else function


def _trl_columns(attempt: Attempt) -> dict[str, Any]:
    chat = attempt.messages is not None
    return {
        "answer": attempt.answer,
        "ground_truth": attempt.answer,
        "data_source": attempt.source,
        "transcript": attempt.full_transcript(),
        **attempt.extra,
        "prompts": list(attempt.messages) if chat else attempt.prompt,
        "completions": [{"role": "assistant", "content": attempt.response}] if chat else attempt.response,
        "completion_ids": attempt.token_ids.tolist(),
    }


def _check_call(function: Callable[..., Any], names: tuple[str, ...]) -> None:
    """Raise TypeError if the function cannot be called with arguments of these names."""
    signature = inspect.Signature(parameters_of(function))
    try:
        signature.bind(**dict.fromkeys(names))
    except TypeError as error:
        hint = "; for TRL's convention set reward.adapter trl" if "completions" in signature.parameters else ""
        raise TypeError(f"{error}; it must take {', '.join(names)}, by these names or as **kwargs{hint}") from error


def _to_its_end(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, awaited if it is async. All calls share one event loop: a client may be bound to it."""
    runner = asyncio.Runner()

    def call(**arguments: Any) -> Any:
        result = function(**arguments)
        return runner.run(result) if inspect.iscoroutine(result) else result

    return call
