"""A prompt's uid depends on what the actor and the reward see, never on the prompt's row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dapo_mcore.config.data import DataConfig
from dapo_mcore.data.loader import PromptLoader
from dapo_mcore.data.prompts import load_prompts

ROWS = [{"prompt": f"{n}+1=", "answer": n + 1, "data_source": "sums", "level": n % 2} for n in range(6)]


@pytest.fixture
def uids(tokenizer, tmp_path: Path):
    """The uids of a file's prompts by text; the file keeps its name."""

    def uids(rows: list[dict], **settings) -> dict[str, str]:
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = DataConfig(files=[str(tmp_path / "train.jsonl")], answer_key="answer", **settings)
        prompts = load_prompts(config, tokenizer).prompts
        assert len({prompt.uid for prompt in prompts}) == len(prompts)
        uids.state = PromptLoader(prompts, seed=0, shuffle=True).state()
        return {prompt.text: prompt.uid for prompt in prompts}

    return uids


def test_a_prompt_that_moves_keeps_its_uid(uids):
    before = uids(ROWS)
    added = uids([{"prompt": "7+7=", "answer": 14}, *ROWS])
    assert {text: added[text] for text in before} == before and added["7+7="] not in before.values()
    assert uids(ROWS[::-1]) == before


@pytest.mark.parametrize(
    "change", [{"answer": 9}, {"data_source": "other"}, {"level": 5}, {"prompt": "3+1=?"}, {"more": None}]
)
def test_a_prompt_whose_content_changes_gets_another_uid(uids, change: dict):
    before = set(uids(ROWS).values())
    after = set(uids([*ROWS[:3], {**ROWS[3], **change}, *ROWS[4:]]).values())
    assert len(before & after) == 5 and len(before | after) == 7


@pytest.mark.parametrize("settings", [{"prompt_template": "0+{prompt}"}, {"add_bos": True}, {"max_prompt_tokens": 3}])
def test_another_wording_of_all_prompts_gives_each_another_uid(uids, settings: dict):
    rows = [*ROWS, {"prompt": "ab", "answer": 1}]
    before = uids(rows)
    after = uids(rows, **settings)
    short = {"ab"} if "max_prompt_tokens" in settings else set()  # a prompt that fits is not cut and keeps its uid
    assert {text for text in before if before[text] in after.values()} == short


def test_equal_rows_get_different_uids_if_both_are_kept(tokenizer, tmp_path: Path):
    (tmp_path / "train.jsonl").write_text((json.dumps(ROWS[0]) + "\n") * 3)
    config = DataConfig(files=[str(tmp_path / "train.jsonl")], answer_key="answer", deduplicate=False)
    first, second, third = (prompt.uid for prompt in load_prompts(config, tokenizer).prompts)
    assert (second, third) == (f"{first}#2", f"{first}#3")


def test_a_loaders_position_depends_on_data_and_order(uids):
    states = []
    for rows, settings in [(ROWS, {}), (ROWS, {}), (ROWS[::-1], {}), (ROWS[1:], {}), (ROWS, {"add_bos": True})]:
        uids(rows, **settings)
        states.append(uids.state["order"])
    assert states[0] == states[1]
    assert len({json.dumps(state) for state in states}) == 4
