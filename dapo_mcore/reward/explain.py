"""Explanation, step by step, of why a response got its score.

Change here: what `dapo-mcore reward-explain` prints, and the command that messages suggest. The reward function itself gives the score.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from typing import Any, get_args

from dapo_mcore.config.reward import RewardConfig
from dapo_mcore.errors import DataError, RewardError, shortened
from dapo_mcore.reward.attempt import Attempt, Outcome, Transcript, judged
from dapo_mcore.reward.by_source import TABLE, rule_for
from dapo_mcore.reward.math_answer import (
    _ANSWER_WINDOW,
    _BOX_WINDOW,
    ANSWER,
    INVALID,
    VALUE_WINDOW,
    compute_score,
    last_boxed,
    normalize_answer,
)
from dapo_mcore.reward.plugins import Rule, build_judge
from dapo_mcore.reward.pool import RewardPool
from dapo_mcore.types import NO_ANSWER, CallKind

_DEADLINE_S = 30.0
_LONGEST_QUOTE = 300
_GRADERS = ("math_dapo", "math_verify")
_SEARCHES = {
    "gsm8k": "the number after the last `#### ` of the last 300 characters",
    "math_boxed": "the last \\boxed{…}, compared as text in MATH's normal form",
}
"""Where the graders that tell only an outcome look for an answer."""
_NO_CALL = {"name": "", "arguments": "", "kind": "ok", "output": "", "seconds": 0.0}
_CALL_KINDS = get_args(CallKind)


def explain(attempt: Attempt, rule: Rule | None = None) -> list[str]:
    """Return lines: the rule (None: math_dapo), the text it searched, what it matched and compared, and the score.

    For a user's function only the outcome is known. Raise RewardError if the function cannot be loaded.
    """
    heading, *lines = _explain(attempt, rule or Rule())
    return [heading, *(f"  {line}" for line in _transcript_lines(attempt)), *lines]


def shell_command(config: RewardConfig, source: str, answer: str, response: str) -> str:
    """Return the shell command, in one line, that explains the score of a response to a row of this data source."""
    function = rule_for(source, config.by_source) if config.function == "by_source" else config.function
    options = ["--adapter", config.adapter] if config.adapter != "verl" else []
    if config.strict_box:
        options += ["--strict-box"]
    if config.kwargs and ":" in str(function):
        options += ["--kwargs", json.dumps(config.kwargs)]
    if source:
        options += ["--source", source]
    command = shlex.join(["dapo-mcore", "reward-explain", "--function", str(function), *options])
    truth = shlex.quote(answer) if answer.isprintable() else _quoted(answer)
    return f"{command} --answer {truth} --text {_quoted(response)}"


def _quoted(text: str) -> str:
    """Return a text in one line, as bash and zsh read it."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"$'{escaped}'"


def read_transcript(text: str) -> Transcript:
    """Return the transcript of a JSON object with `turns` and perhaps `calls` and `num_turns`. Raise DataError if it is something
    else, or has something that no run gives."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise DataError(f"--transcript is not valid JSON: {error}") from error
    turns, calls = (found.get("turns"), found.get("calls", [])) if isinstance(found, dict) else (None, None)
    if not _is_list_of(str, turns) or not _is_list_of(dict, calls):
        raise DataError(
            '--transcript must be a JSON object such as {"turns": ["Let me see.", "Answer: 7"], "calls": [{"name": "python", '
            f'"arguments": "3 + 4", "kind": "ok", "output": "7", "seconds": 0.1}}]}}, not {text!r:.80}'
        )
    _check_keys(found, ("num_turns", "turns", "calls"), "--transcript")
    if (num_turns := found.get("num_turns", len(turns))) != len(turns):
        raise DataError(f"--transcript has num_turns {num_turns!r:.80}, but {len(turns)} turns; leave num_turns out")
    for number, call in enumerate(calls, start=1):
        _check_call(call, f"--transcript: call {number}")
    return {"num_turns": len(turns), "turns": turns, "calls": [_NO_CALL | call for call in calls]}


def _check_call(call: dict[str, Any], where: str) -> None:
    _check_keys(call, tuple(_NO_CALL), where)
    for key, value in call.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number if key == "seconds" else isinstance(value, str)):
            raise DataError(f"{where} has {key} {value!r:.80}; it must be {'a number' if key == 'seconds' else 'text'}")
    if (kind := call.get("kind", "ok")) not in _CALL_KINDS:
        raise DataError(f"{where} has kind {kind!r:.80}; the kinds are {', '.join(_CALL_KINDS)}")


def _check_keys(found: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    if unknown := [key for key in found if key not in known]:
        raise DataError(f"{where} has the unknown key {unknown[0]!r:.80}; the keys are {', '.join(known)}")


def _is_list_of(kind: type, values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _explain(attempt: Attempt, rule: Rule) -> list[str]:
    if rule.function == "by_source":
        heading, *lines = _explain(attempt, replace(rule, function=_chosen(attempt, rule)))
        return [f"by_source takes for {attempt.source!r} {heading}", *lines]
    outcome, function = _grade(attempt, rule), rule.function
    if ":" in function:
        return _block(f"{function}, called as {rule.adapter}", _outcome_lines(attempt, outcome), outcome)
    if function in _SEARCHES:
        return _block(function, [f"looked at   {_SEARCHES[function]}", *_outcome_lines(attempt, outcome)], outcome)
    if function == "math_verify":
        return _block(function, _value_lines(attempt, outcome), outcome)
    if rule.strict_box:
        return _block(f"{function} with strict_box", _box_lines(attempt.response, attempt.answer), outcome)
    return _block(function, _text_lines(attempt.response, attempt.answer), outcome)


def explain_other(attempt: Attempt, function: str) -> list[str]:
    """Return the lines of the other built-in grader, or one line if it is not installed; [] for a user's function."""
    if function not in _GRADERS:
        return []
    (other,) = set(_GRADERS) - {function}
    try:
        heading, *lines = _explain(attempt, Rule(other))
    except RewardError:
        return [f"{other}, for comparison: not installed here; pip install 'math-verify[antlr4_13_2]' adds it"]
    return [f"{heading}, for comparison", *lines]


def _chosen(attempt: Attempt, rule: Rule) -> str:
    if (function := rule_for(attempt.source, rule.by_source)) is None:
        raise RewardError(
            f"reward.by_source has no rule for the data source {attempt.source!r}; name one with --source, such as "
            f"{', '.join(TABLE)}, or a function with --function"
        )
    return function


def _grade(attempt: Attempt, rule: Rule) -> Outcome:
    """Return the outcome as a run would get it: a function that may hang runs in a process with a deadline."""
    if rule.function == "math_dapo" or rule.function in _SEARCHES:
        return judged(build_judge(rule), attempt)
    pool = RewardPool(1, rule, timeout_seconds=_DEADLINE_S)
    try:
        (outcome,) = pool.score([attempt])
    finally:
        pool.close()
    return outcome


def _block(heading: str, lines: list[str], outcome: Outcome) -> list[str]:
    return [heading, *(f"  {line}" for line in [*lines, f"score       {_verdict(outcome)}"])]


def _verdict(outcome: Outcome) -> str:
    if outcome.failure is not None:
        return f"none: {outcome.failure} (reward.on_failure decides what a run does with it)"
    credit = {0.0: "wrong", 1.0: "right"}.get(outcome.acc, f"acc {outcome.acc:g}")
    return f"{outcome.score:+g} ({credit})"


def _transcript_lines(attempt: Attempt) -> list[str]:
    """Return a line about the turns and one for each call, [] without a transcript."""
    if attempt.transcript is None:
        return []
    calls = [
        f"call {number:<7}{call['name']}: {call['kind']}: {shortened(call['output'], _LONGEST_QUOTE)!r}"
        for number, call in enumerate(attempt.transcript["calls"], start=1)
    ]
    return [f"turns       {attempt.transcript['num_turns']}; what tools gave is not scored", *calls]


def _outcome_lines(attempt: Attempt, outcome: Outcome) -> list[str]:
    told = "none" if outcome.pred == INVALID else "none told"
    prediction = f"{outcome.pred!r}" if outcome.pred not in NO_ANSWER else told
    return [f"prediction  {prediction}", f"truth       {attempt.answer!r}"]


def _value_lines(attempt: Attempt, outcome: Outcome) -> list[str]:
    """Return the lines for math_verify, from its outcome alone: it ran in another process."""
    found = None if outcome.failure or outcome.pred == INVALID else outcome.pred
    if compute_score(attempt.response, attempt.answer)["acc"]:
        matched, how = "what math_dapo takes", "compared as text, as in math_dapo"
    elif found is not None:
        matched, how = "the last box, else the last formula or number", "compared by value"
    else:
        matched, how = "unknown" if outcome.failure else "no box, formula or number", ""
    return [
        _looked_at(attempt.response, VALUE_WINDOW),
        f"matched     {matched}" + (f": {found!r}" if found is not None else ""),
        f"prediction  {found!r} ({how})" if found is not None else "prediction  none",
        f"truth       {attempt.answer!r}",
    ]


def _text_lines(response: str, ground_truth: str) -> list[str]:
    matches = ANSWER.findall(response[-_ANSWER_WINDOW:])
    if matches:
        matched = f"{_count(len(matches), '`Answer: …` line')}, the last is taken: {matches[-1]!r}"
        prediction = f"{matches[-1]!r} -> {normalize_answer(matches[-1])!r}"
    else:
        earlier = len(ANSWER.findall(response))
        matched = "no `Answer: …` in the window" + (f"; {earlier} earlier, outside the window" if earlier else "")
        prediction = "none"
    return [
        _looked_at(response, _ANSWER_WINDOW),
        f"matched     {matched}",
        f"prediction  {prediction}",
        f"truth       {ground_truth!r} -> {normalize_answer(ground_truth)!r}",
    ]


def _box_lines(response: str, ground_truth: str) -> list[str]:
    window = response[-_BOX_WINDOW:]
    found, opened = last_boxed(window), len(re.findall(r"\\boxed\{", window))
    if found is None:
        matched = "a \\boxed{ that never closes" if opened else "no \\boxed{…} in the window"
    else:
        matched = f"{_count(opened, 'box')}, the last is taken: {found!r}"
    return [
        _looked_at(response, _BOX_WINDOW),
        f"matched     {matched}",
        "prediction  none" if found is None else f"prediction  {found!r} (compared literally)",
        f"truth       {ground_truth!r}",
    ]


def _looked_at(response: str, window: int) -> str:
    seen = response[-window:]
    much = f"the last {window} of {len(response)}" if len(response) > window else f"all {len(response)}"
    ends = ", which end with" if len(seen) > _LONGEST_QUOTE else ""
    return f"looked at   {much} characters{ends}: {seen[-_LONGEST_QUOTE:]!r}"


def _count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("x") else "s")
    return f"{number} {noun if number == 1 else plural}"
