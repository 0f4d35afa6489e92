"""Demonstrations of a warm start: prompts and responses as tokens, and rows that are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dapo_mcore.config.schema import Config
from dapo_mcore.data.demonstrations import Demonstration, load_demonstrations
from dapo_mcore.errors import DataError

ROWS = [{"prompt": "ab", "response": "1"}, {"prompt": "b", "response": "12"}, {"prompt": "a", "response": ""}]


@pytest.fixture
def load(tokenizer, tmp_path: Path) -> Callable[..., tuple[tuple[Demonstration, ...], str]]:
    """load(*rows, batch_size, most, …) writes the rows and loads them; the rest are settings of the data section."""

    def load(*rows: dict, batch_size: int = 1, most: int | None = None, **data):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (tmp_path / "demos.jsonl").write_text("".join(lines), encoding="utf-8")
        warm_start = {"files": str(tmp_path / "demos.jsonl"), "batch_size": batch_size}
        tree = {"model": {"path": "unused"}, "data": {"files": "unused", **data}, "warm_start": warm_start}
        return load_demonstrations(Config.model_validate(tree), tokenizer, most)

    return load


def test_a_response_ends_with_the_end_of_sequence_and_a_prompt_does_not(load, tmp_path: Path):
    """Characters have ids of their own: `1` 22, `2` 23, `a` 70, `b` 71, the end of the sequence 1."""
    found, told = load(*ROWS)
    assert [(row.prompt.tolist(), row.response.tolist()) for row in found] == [
        ([70, 71], [22, 1]),
        ([71], [22, 23, 1]),
        ([70], [1]),
    ]
    assert {array.dtype for row in found for array in (row.prompt, row.response)} == {np.dtype(np.int32)}
    assert [len(row) for row in found] == [4, 4, 2] and told == ""
    assert found[2].row == f"{tmp_path}/demos.jsonl row 3"


def test_of_a_response_with_tools_only_the_policys_texts_are_trained_on(load):
    (only,), _ = load({"prompt": "a", "response": ["1", "22", "2"]})
    assert only.response.tolist() == [22, 23, 23, 23, 1]
    assert only.trained.tolist() == [True, False, False, True, True]
    (plain,), _ = load(ROWS[1])
    assert plain.trained.all()


def test_prompts_are_rendered_as_the_data_section_says(load):
    (only,), _ = load(ROWS[0], prompt_template="{prompt}=", add_bos=True)
    assert only.prompt.tolist() == [2, 70, 71, 34]


def test_only_as_many_rows_are_read_as_are_asked_for_but_one_batch_at_least(load):
    broken = {"prompt": "not read"}
    assert len(load(*ROWS, broken, most=2)[0]) == 2
    assert len(load(*ROWS, broken, most=1, batch_size=3)[0]) == 3


def test_fewer_rows_than_a_batch_are_refused(load):
    with pytest.raises(
        DataError, match=r"hold 3 demonstrations, fewer than warm_start\.batch_size 4; add rows or lower"
    ):
        load(*ROWS, batch_size=4)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "x", "answer": 1}, "the row has prompt, answer"),
        ({"prompt": "x", "response": 1}, "the row has prompt, response"),
        ({"prompt": "", "response": "1"}, "the row has prompt, response"),
        ({}, "the row has nothing"),
        ({"prompt": "x", "response": ["1", "2"]}, "the row has prompt, response"),
        ({"prompt": "x", "response": ["1", 2, "3"]}, "the row has prompt, response"),
    ],
)
def test_a_row_without_prompt_or_response_is_named(load, row: dict, told: str):
    with pytest.raises(
        DataError, match=rf"demos.jsonl row 2: a demonstration needs .*odd number of texts, .*; {told}$"
    ):
        load(ROWS[0], row)


def test_characters_without_a_token_are_reported(load):
    _, told = load({"prompt": "dé", "response": "1é字"}, *ROWS)
    assert told.startswith(
        "1 of 4 demonstrations of warm_start.files lose characters that the tokenizer has no token for: é 字 "
    )


def test_with_a_chat_template_a_response_ends_as_the_template_ends_a_turn(load, tokenizer, monkeypatch):
    """The control token that plain text ends with is 1; this template ends turns with the token 2."""
    begin, end = tokenizer.convert_ids_to_tokens([2, 1])
    assert begin != end
    template = "{% for m in messages %}{{ m.content }}" + begin + "{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    (only,), _ = load(ROWS[0], chat_template=True)
    assert only.response.tolist() == [22, 2]
    (plain,), _ = load(ROWS[0], chat_template=False)
    assert plain.response.tolist() == [22, 1]
