"""The rules of data sources: verl's table, a user's before it, and sources without a rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dapo_mcore.config.schema import Config
from dapo_mcore.errors import DataError
from dapo_mcore.reward.by_source import check_sources, rule_for
from dapo_mcore.types import Prompt


def configured(**sections: Any) -> Config:
    return Config.model_validate({"model": {"path": "m"}, "data": {"files": ["f"]}, **sections})


def prompts(**sources: int) -> list[Prompt]:
    one = np.zeros(1, np.int32)
    return [Prompt("", one, "", "", source) for source, count in sources.items() for _ in range(count)]


@pytest.mark.parametrize(
    ("source", "function"),
    [
        ("openai/gsm8k", "gsm8k"),
        ("lighteval/MATH", "math_boxed"),
        ("DigitalLearningGmbH/MATH-lighteval", "math_boxed"),
        ("HuggingFaceH4/MATH-500", "math_boxed"),
        ("math_dapo", "math_dapo"),
        ("math", "math_dapo"),
        ("math_dapo_reasoning", "math_dapo"),
        ("aime24", "math_dapo"),
        ("aime_2025", "math_dapo"),
        ("AIME24", None),
        ("gsm8k", None),
        ("", None),
    ],
)
def test_the_table_is_verls(source: str, function: str | None):
    assert rule_for(source, {}) == function


def test_a_users_patterns_come_first_in_their_order():
    table = {"aime25": "a.py:f", "aime*": "math_verify", "": "gsm8k"}
    assert [rule_for(source, table) for source in ("aime25", "aime24", "", "math")] == [
        "a.py:f",
        "math_verify",
        "gsm8k",
        "math_dapo",
    ]


def test_sources_without_a_rule_are_named_with_their_numbers():
    config = configured(reward={"function": "by_source"}, eval={"sets": {"held": {"files": "f"}}})
    sets = {"data": prompts(math=3, taco=2), "eval.sets.held": [*prompts(numina_x=1), *prompts(**{"": 1})]}
    with pytest.raises(DataError) as error:
        check_sources(config, sets)
    told = str(error.value)
    assert "no rule for 'taco' (2 of 5 prompts of data: verl runs the code" in told
    assert "'numina_x' (1 of 2 prompts of eval.sets.held: verl compares these with SymPy" in told
    assert "'' (1 of 2 prompts of eval.sets.held: these rows have no source; name its column in eval.sets" in told


def test_sets_that_are_scored_otherwise_need_no_rule():
    taco = {"data": prompts(taco=1), "eval.sets.held": prompts(taco=1)}
    assert check_sources(configured(), taco) == []
    own = {"sets": {"held": {"files": "f", "reward_function": "math_dapo"}}}
    config = configured(reward={"function": "by_source"}, eval=own)
    assert check_sources(config, {"data": prompts(math=1, aime=2), "eval.sets.held": prompts(taco=1)}) == [
        "data: scored by source, 'math' by math_dapo (1), 'aime' by math_dapo (2)"
    ]
    own = {"sets": {"held": {"files": "f", "reward_function": "by_source"}}}
    with pytest.raises(DataError, match=r"no rule for 'taco' \(1 of 1 prompts of eval.sets.held"):
        check_sources(configured(eval=own), taco)
