"""Reward functions that cannot score are found before a run, and others are left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dapo_mcore.config.file import parse_config
from dapo_mcore.config.schema import Config
from dapo_mcore.errors import RewardError
from dapo_mcore.reward.trial import build_tried_rewards
from dapo_mcore.types import Prompt


def config(function: str, **sections: Any) -> Config:
    reward = {"function": function, "workers": 0, **sections.pop("reward", {})}
    return parse_config({"model": {"path": "m"}, "data": {"files": ["d"]}, "reward": reward, **sections})


def prompts(*sources: str) -> list[Prompt]:
    return [
        Prompt(f"t:{n}", np.ones(2, np.int32), "q", f"{n}", source, row=f"f row {n}")
        for n, source in enumerate(sources)
    ]


def write(folder: Path, text: str) -> str:
    path = folder / "r.py"
    path.write_text(f"def f(data_source, solution_str, ground_truth, extra_info=None):\n    {text}\n", encoding="utf-8")
    return f"{path}:f"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("return 1 / 0", "exception: ZeroDivisionError: division by zero"),
        ("return '1.0'", "exception: TypeError: the reward function gave '1.0' of type str instead of a number"),
        ("pass", "none: the reward function gave no score"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_function_that_scores_nothing_is_an_error(tmp_path: Path, text: str, why: str, workers: int) -> None:
    made = config(write(tmp_path, text), reward={"workers": workers})
    with pytest.raises(RewardError, match=r"reward.function '.*' gives no score for f row 0, neither") as error:
        build_tried_rewards(made, {"data": prompts("a")})
    assert why in str(error.value) and "--source a --answer 0 --text $'0' tries it" in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "return float(int(solution_str) == int(ground_truth))",  # raises for a response that is no number
        "return None if solution_str == ground_truth else 0.0",
        "return 1.0 if ground_truth == '1' else 1 / 0",  # the first row is a bad one
    ],
)
def test_a_function_that_scores_a_single_response_passes(tmp_path: Path, text: str) -> None:
    reward, others = build_tried_rewards(config(write(tmp_path, text)), {"data": prompts("a", "a")})
    reward.close()
    assert others == {}


def test_each_source_and_each_set_has_its_own_trial(tmp_path: Path) -> None:
    function = write(tmp_path, "return {'a': 1.0}[data_source]")
    with pytest.raises(RewardError, match=r"gives no score for f row 2,.*KeyError: 'b'"):
        build_tried_rewards(config(function), {"data": prompts("a", "a", "b")})
    by_source = config("by_source", reward={"by_source": {"b": function}})
    with pytest.raises(RewardError, match=r"reward.function '.*r.py:f' gives no score for f row 1,.*KeyError: 'b'"):
        build_tried_rewards(by_source, {"data": prompts("math", "b")})
    sets = {"held": {"files": ["d"], "reward_function": function}}
    own = config("math_dapo", eval={"sets": sets})
    with pytest.raises(RewardError, match=r"eval.sets.held.reward_function '.*' gives no score for f row 0"):
        build_tried_rewards(own, {"data": prompts("b"), "eval.sets.held": prompts("b")})


def test_a_source_of_several_sets_is_tried_once(tmp_path: Path) -> None:
    count = tmp_path / "count"
    function = write(tmp_path, f"open({str(count)!r}, 'a').write('x'); return 1.0")
    build_tried_rewards(config(function), {"data": prompts("a", "a", "a"), "eval.sets.x": prompts("a")})
    assert count.read_text() == "xxxx", "the answer and a wrong response of two rows"


def test_a_column_of_many_sources_is_tried_in_part(tmp_path: Path) -> None:
    count = tmp_path / "count"
    function = write(tmp_path, f"open({str(count)!r}, 'a').write('x'); return 1.0")
    build_tried_rewards(config(function), {"data": prompts(*map(str, range(100)))})
    assert len(count.read_text()) == 16 * 2
