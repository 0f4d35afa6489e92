"""The reward functions of a run, tried on rows of its data before anything is generated.

Change here: on which responses a function is tried, and when it counts as broken.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from dapo_mcore.config.schema import Config
from dapo_mcore.errors import RewardError
from dapo_mcore.reward.attempt import Attempt
from dapo_mcore.reward.by_source import rule_for
from dapo_mcore.reward.scorer import Scorer, build_reward, build_set_rewards
from dapo_mcore.types import Prompt

_ROWS = 2
"""Rows of each data source on which a function is tried."""
_WRONG = "I do not know."


def build_tried_rewards(config: Config, sets: Mapping[str, Sequence[Prompt]]) -> tuple[Scorer, dict[str, Scorer]]:
    """Return the run's reward function, and those of evaluation sets that have one of their own.

    sets  prompts by their section: `data`, `eval.sets.aime24`, `warm_start.choose`.
    Users' functions score the answers of the first rows of each data source, and a wrong response. Raise RewardError if one of
    them gives no score for any of these, or cannot be loaded; then no worker is left.
    """
    reward, others = build_reward(config.reward, config.rollout.max_response_tokens, config.ray.address), {}
    try:
        others = build_set_rewards(config)
        tried: set[tuple[Scorer, str]] = set()
        for section, prompts in sets.items():
            own = others.get(section.removeprefix("eval.sets.")) if section.startswith("eval.sets.") else None
            key, scorer = (f"{section}.reward_function", own) if own else ("reward.function", reward)
            for source, rows in _by_source(prompts).items():
                if (scorer, source) not in tried:
                    _try_rows(scorer, key, source, rows)
                tried.add((scorer, source))
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


def _try_rows(scorer: Scorer, key: str, source: str, rows: Sequence[Prompt]) -> None:
    """Raise RewardError if a user's function scores nothing of the rows of a data source."""
    function: str | None = scorer.config.function
    if function == "by_source":
        function = rule_for(source, scorer.config.by_source)
    if function is None or ":" not in function:
        return
    failures = [
        outcome.failure
        for outcome in scorer.judge([_attempt(row, text) for row in rows for text in (row.answer, _WRONG)])
    ]
    if not all(failures):
        return
    answer = shlex.quote(rows[0].answer)
    raise RewardError(
        f"{key} {function!r} gives no score for {rows[0].row}, neither for its answer as the response nor for a wrong one: "
        f"{failures[0]}; mend the function. dapo-mcore reward-explain --function {shlex.quote(function)} --answer {answer} "
        f"--text {answer} tries it on one response"
    )


def _attempt(prompt: Prompt, response: str) -> Attempt:
    """Return a response of one turn. Its tokens are the prompt's: functions may take the number or the ids, but not their text."""
    return Attempt(prompt.text, response, prompt.answer, prompt.source, prompt.extra, prompt.token_ids, prompt.messages)
