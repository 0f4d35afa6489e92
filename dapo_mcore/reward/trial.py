"""The reward functions of a run, tried on rows of its data before anything is generated.

Change here: on which responses a function is tried, and when it counts as broken.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from dapo_mcore.config.schema import Config
from dapo_mcore.errors import RewardError
from dapo_mcore.reward.attempt import Attempt
from dapo_mcore.reward.by_source import rule_for
from dapo_mcore.reward.explain import shell_command
from dapo_mcore.reward.scorer import Scorer, build_reward, build_set_rewards
from dapo_mcore.types import Prompt

_ROWS = 2
"""Rows of each data source on which a function is tried."""
_SOURCES = 16
"""Data sources on which a function is tried: a column may name thousands, and a judge may take seconds."""
_WRONG = "I do not know."


def build_tried_rewards(config: Config, sets: Mapping[str, Sequence[Prompt]]) -> tuple[Scorer, dict[str, Scorer]]:
    """Return the run's reward function, and those of evaluation sets that have one of their own.

    sets  prompts by their section: `data`, `eval.sets.aime24`, `warm_start.choose`.
    Users' functions score the answers of the first rows of each data source, up to 16 sources, and a wrong response. Raise
    RewardError if one of them gives no score for any of these, or cannot be loaded; then no worker is left.
    """
    reward, others = build_reward(config.reward, config.rollout.max_response_tokens, config.ray.address), {}
    try:
        others = build_set_rewards(config)
        tried: dict[tuple[Scorer, str], set[str]] = defaultdict(set)
        for section, prompts in sets.items():
            own = others.get(section.removeprefix("eval.sets.")) if section.startswith("eval.sets.") else None
            key, scorer = (f"{section}.reward_function", own) if own else ("reward.function", reward)
            for source, rows in _by_source(prompts).items():
                if (function := _function(scorer, source)) is None:
                    continue
                sources = tried[scorer, function]
                if source not in sources and len(sources) < _SOURCES:
                    sources.add(source)
                    _try_rows(scorer, key, function, rows)
    except BaseException:
        for scorer in (reward, *others.values()):
            scorer.close()
        raise
    return reward, others


def _by_source(prompts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
    """Return the first _ROWS prompts of each data source."""
    rows: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        if len(found := rows.setdefault(prompt.source, [])) < _ROWS:
            found.append(prompt)
    return rows


def _function(scorer: Scorer, source: str) -> str | None:
    """Return the user's function that scores rows of a data source; None if a built-in one does."""
    config = scorer.config
    function = rule_for(source, config.by_source) if config.function == "by_source" else config.function
    return function if function and ":" in function else None


def _try_rows(scorer: Scorer, key: str, function: str, rows: Sequence[Prompt]) -> None:
    """Raise RewardError if the function scores nothing of the rows, which are of one data source."""
    failures = [
        outcome.failure
        for outcome in scorer.judge([_attempt(row, text) for row in rows for text in (row.answer, _WRONG)])
    ]
    if not all(failures):
        return
    command = shell_command(scorer.config, rows[0].source, rows[0].answer, rows[0].answer)
    raise RewardError(
        f"{key} {function!r} gives no score for {rows[0].row}, neither for its answer as the response nor for a wrong one: "
        f"{failures[0]}; mend the function. {command} tries it on one response"
    )


def _attempt(prompt: Prompt, response: str) -> Attempt:
    """Return a response of one turn. Its tokens are the prompt's: functions may take the number or the ids, but not their text."""
    return Attempt(prompt.text, response, prompt.answer, prompt.source, prompt.extra, prompt.token_ids, prompt.messages)
