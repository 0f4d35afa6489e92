"""Prompt files: both schemas, both formats, and rows that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from dapo_mcore.config.data import DataConfig
from dapo_mcore.data.prompts import PromptSet, load_prompts
from dapo_mcore.errors import ConfigError, DataError

PLAIN = {"prompt_key": "q", "answer_key": "a"}
VERL = {
    "data_source": "math_dapo",
    "prompt": [{"role": "user", "content": "1+1?"}],
    "ability": "MATH",
    "reward_model": {"ground_truth": "2", "style": "rule"},
    "extra_info": {"index": "x1"},
}


def write(path: Path, *rows) -> str:
    """Write a JSONL file and return its path. Text is written as it is, anything else as JSON."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def load(tokenizer, tmp_path):
    def load(*rows, **settings) -> PromptSet:
        files = settings.pop("files", None) or [write(tmp_path / "f.jsonl", *rows)]
        return load_prompts(DataConfig(files=files, **{**PLAIN, **settings}), tokenizer)

    return load


def fates(found: PromptSet) -> dict[str, int]:
    names = ("rows", "bad_rows", "duplicates", "truncated", "dropped", "conflicts")
    return {name: getattr(found, f"num_{name}") for name in names if getattr(found, f"num_{name}")}


def test_plain_columns(load):
    found = load({"q": "ab", "a": 7, "level": 3}, {"q": "b", "a": "x", "data_source": "set"})
    first, second = found.prompts
    assert (first.text, first.token_ids.tolist(), first.answer) == ("ab", [70, 71], "7")
    assert (first.source, dict(first.extra)) == ("", {"a": "7", "level": 3})
    assert (second.answer, second.source, dict(second.extra)) == ("x", "set", {"a": "x", "data_source": "set"})
    assert first.messages is second.messages is None
    assert found.describe() == "data: 2 rows gave 2 prompts" and found.warnings() == []


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_verls_schema_in_both_formats(tokenizer, tmp_path, suffix):
    path = tmp_path / f"f.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([VERL]), path)
    else:
        write(path, VERL)
    (tmp_path / "t.jinja").write_text("{{ messages[0].role }}>{{ messages[0].content }}")
    config = DataConfig(files=[str(path)], chat_template=str(tmp_path / "t.jinja"))
    (prompt,) = load_prompts(config, tokenizer).prompts
    assert (prompt.text, prompt.answer, prompt.source) == ("user>1+1?", "2", "math_dapo")
    assert prompt.extra["extra_info"] == {"index": "x1"}
    assert prompt.extra["ability"] == "MATH"
    assert prompt.messages == VERL["prompt"]


def test_a_column_with_a_dot_in_its_name_comes_first(load):
    (prompt,) = load({"q": "x", "a.b": "flat", "a": {"b": "nested"}}, answer_key="a.b").prompts
    assert prompt.answer == "flat"


def test_prompts_know_their_file_and_row_even_if_other_rows_are_left_out(load, tmp_path):
    one = write(tmp_path / "one.jsonl", {"q": "x", "a": "1"}, "{broken", "", {"q": "x", "a": "1"})
    two = write(tmp_path / "two.jsonl", {"q": "y", "a": "1"})
    found = load(files=[one, two], on_bad_row="skip")
    assert [prompt.row for prompt in found.prompts] == [f"{one} row 1", f"{two} row 1"]
    assert fates(found) == {"rows": 4, "bad_rows": 1, "duplicates": 1}
    assert "2 prompts (1 bad, 1 duplicates); first bad row: " in found.describe()
    assert "one.jsonl row 2: not valid JSON" in found.describe()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("[1]", "a row must be a JSON object, not a list"),
        ('{"q": "x', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ({"a": "1", "Q": "x"}, "no 'q', the row has a, Q; name the column in data.prompt_key"),
        (
            {"rows": [{"q": "x", "a": "1"}]},
            "no 'q', the row has rows; the rows seem to be in its list rows: write them one a line, jq -c '.rows[]'",
        ),
        ({"q": "x"}, "no 'a', the row has q; name the column in data.answer_key"),
        ({"q": None, "a": "1"}, "'q' is null"),
        ({"q": "x", "a": None}, "'a' is null"),
        ({"q": "x", "a": "  "}, "the answer is empty"),
        ({"q": "x", "a": 45.0}, "text or an integer, got the float 45.0"),
        ({"q": "x", "a": True}, "got the bool True"),
        ({"q": "x", "a": ["1"]}, "got the list"),
        ({"q": 5, "a": "1"}, "the prompt is a int, not text"),
        ({"q": "", "a": "1"}, "no tokens"),
        ({"q": "x", "a": "1", "data_source": 4}, "'data_source' must be text, got 4"),
    ],
)
def test_a_bad_row_is_refused_or_skipped_and_counted(load, row, reason):
    good = {"q": "good", "a": "1"}
    with pytest.raises(DataError) as error:
        load(good, row)
    assert "f.jsonl row 2: " in str(error.value)
    assert reason in str(error.value)
    assert "on_bad_row skip" in str(error.value)
    found = load(good, row, on_bad_row="skip")
    assert [prompt.text for prompt in found.prompts] == ["good"]
    assert fates(found) == {"rows": 2, "bad_rows": 1}
    assert reason in found.first_bad_row


def test_bytes_that_are_not_utf8_are_refused(load, tmp_path):
    (tmp_path / "b.jsonl").write_bytes(b'{"q": "\xff", "a": "1"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl row 1: byte 8 \(0xff\) is not UTF-8; convert the file"):
        load(files=[str(tmp_path / "b.jsonl")])


def test_nulls_in_parquet_are_bad_rows(load, tmp_path):
    pq.write_table(pa.table({"q": ["x", "y"], "a": ["1", None]}), tmp_path / "n.parquet")
    with pytest.raises(DataError, match=r"n\.parquet row 2: 'a' is null"):
        load(files=[str(tmp_path / "n.parquet")])


def test_files_that_cannot_be_read_are_named(load, tmp_path):
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "c.xls").write_text("q,a")
    for name, reason in {"absent.jsonl": "no data file", "c.parquet": "cannot be read", "c.xls": "neither"}.items():
        with pytest.raises(DataError, match=reason):
            load(files=[str(tmp_path / name)])


def test_a_set_without_any_usable_prompt_is_an_error(load):
    with pytest.raises(DataError, match=r"no usable prompt.*0 rows gave 0 prompts"):
        load()
    with pytest.raises(DataError, match=r"2 rows gave 0 prompts .2 bad.; first bad row:.* no 'q'"):
        load({}, {}, on_bad_row="skip")


def test_duplicates_are_equal_prompt_and_answer(load):
    rows = [{"q": "x", "a": "1", "id": 1}, {"q": "x", "a": "1", "id": 2}, {"q": "x", "a": "2"}]
    assert fates(load(*rows)) == {"rows": 3, "duplicates": 1, "conflicts": 1}
    assert [prompt.answer for prompt in load(*rows).prompts] == ["1", "2"]
    kept = load(*rows, deduplicate=False)
    assert (len(kept.prompts), kept.num_repeats, kept.num_duplicates) == (3, 1, 0)
    assert kept.describe() == "data: 3 rows gave 3 prompts (1 repeats of an earlier row, which stay)"


def test_one_prompt_with_two_answers_gives_a_warning_with_both_rows(load):
    found = load({"q": "x", "a": "1"}, {"q": "y", "a": "1"}, {"q": "x", "a": "2"}, {"q": "x", "a": "1"})
    (line,) = found.warnings()
    assert line.startswith("warning: 1 prompts of data come with another answer than before")
    assert "f.jsonl row 3 says '2', " in line and "f.jsonl row 1 says '1'; correct or remove" in line


def test_long_prompts_are_cut_dropped_or_refused(load):
    rows = [{"q": "abcdef", "a": "1"}, {"q": "abc", "a": "1"}]
    cut = load(*rows, max_prompt_tokens=3)
    assert [prompt.text for prompt in cut.prompts] == ["def", "abc"]
    assert [len(prompt.token_ids) for prompt in cut.prompts] == [3, 3]
    assert fates(cut) == {"rows": 2, "truncated": 1}
    dropped = load(*rows, max_prompt_tokens=3, on_long_prompt="drop")
    assert [prompt.text for prompt in dropped.prompts] == ["abc"]
    assert fates(dropped) == {"rows": 2, "dropped": 1}
    with pytest.raises(DataError, match=r"row 1: the prompt has 6 tokens, but data.max_prompt_tokens is 3"):
        load(*rows, max_prompt_tokens=3, on_long_prompt="error", on_bad_row="skip")


@pytest.mark.parametrize(
    ("how", "kept", "told"),
    [
        ("truncate_left", "cdefg", "cut on the left"),
        ("truncate_right", "abcde", "cut on the right"),
        ("truncate_middle", "abefg", "cut in the middle"),
    ],
)
def test_a_long_prompt_loses_its_beginning_its_end_or_its_middle(load, how, kept, told):
    """Of 5 tokens the middle form keeps 5 // 2 = 2 first ones and 3 last ones."""
    found = load({"q": "abcdefg", "a": "1"}, {"q": "ab", "a": "1"}, max_prompt_tokens=5, on_long_prompt=how)
    assert [prompt.text for prompt in found.prompts] == [kept, "ab"]
    assert found.prompts[0].token_ids.base is None and found.prompts[0].token_ids.dtype == np.int32
    assert told in found.describe()
    assert f"lose their {how.removeprefix('truncate_').replace('left', 'beginning').replace('right', 'end')}" in str(
        found.warnings()
    )


CHAT = [{"role": "user", "content": "hi"}]


def test_a_chat_in_the_first_row_turns_the_template_on(load, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content }}|")
    on = load("{broken", {"a": 1}, {"q": CHAT, "a": 1}, {"q": "text", "a": 1}, on_bad_row="skip")
    assert [prompt.text for prompt in on.prompts] == ["hi|", "text|"]
    assert on.config.chat_template is True
    (unused,) = load({"q": CHAT, "a": 1}, prompt_template="Q: {prompt}").warnings()
    assert unused.startswith("warning: data.prompt_template has no effect: all prompts are chats")
    assert (
        load({"q": "text", "a": 1}, {"q": CHAT, "a": 1}, chat_template=True, prompt_template="Q: {prompt}").warnings()
        == []
    )
    off = load({"q": "text", "a": 1}, {"q": CHAT, "a": 1}, on_bad_row="skip")
    assert [prompt.text for prompt in off.prompts] == ["text"] and "set data.chat_template true" in off.first_bad_row
    with pytest.raises(DataError, match="the prompt is a list"):
        load({"q": CHAT, "a": 1}, chat_template=False)


def test_settings_of_the_other_kind_of_prompt_are_refused_once_the_rows_are_known(load, tokenizer, monkeypatch):
    with pytest.raises(ConfigError, match=r"data.system_prompt is for chats, but the prompts of data are plain text"):
        load({"q": "text", "a": 1}, system_prompt="S")
    with pytest.raises(ConfigError, match=r"data.chat_template_kwargs is for chats"):
        load({"q": "text", "a": 1}, chat_template_kwargs={"x": 1})
    with pytest.raises(ConfigError, match=r"the first row has a chat\), but the tokenizer has none"):
        load({"q": CHAT, "a": 1})
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content }}|")
    with pytest.raises(ConfigError, match=r"data.add_bos is for plain text, but the prompts of data are chats"):
        load({"q": CHAT, "a": 1}, add_bos=True)


def test_limit_stops_reading(load):
    found = load({"q": "x", "a": "1"}, {"q": "x", "a": "1"}, {"q": "y", "a": "1"}, "{broken", limit=2)
    assert [prompt.text for prompt in found.prompts] == ["x", "y"]
    assert fates(found) == {"rows": 3, "duplicates": 1}


def test_the_answer_pattern_takes_the_last_match(load):
    (prompt,) = load({"q": "x", "a": "#### 3 is a step\n#### 72 "}, answer_pattern="#### (.+)").prompts
    assert prompt.answer == "72"
    with pytest.raises(DataError, match=r"row 1: data.answer_pattern '#### \(.\+\)' does not occur in '72'"):
        load({"q": "x", "a": "72"}, answer_pattern="#### (.+)")


def test_gsm8k_with_the_qwen_tokenizer_and_template(real_data):
    """Real rows, tokenizer and template; the expected text is written out by hand."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(real_data("qwen/tokenizer.json")), eos_token="<|im_end|>")
    config = DataConfig(
        files=[str(real_data("gsm8k/train.jsonl"))],
        prompt_key="question",
        answer_key="answer",
        answer_pattern="#### (.+)",
        chat_template=str(real_data("qwen/qwen2_5.jinja")),
        system_prompt="Think.",
        limit=300,
    )
    found = load_prompts(config, tokenizer, "eval.sets.gsm8k")
    first = found.prompts[0]
    assert (len(found.prompts), first.answer) == (300, "72") and first.row.endswith("gsm8k/train.jsonl row 1")
    assert first.text.startswith("<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\nNatalia sold clips to 48 of")
    assert first.text.endswith("altogether in April and May?<|im_end|>\n<|im_start|>assistant\n")
    assert first.token_ids[:2].tolist() == [151644, 8948]
    assert tokenizer.decode(first.token_ids) == first.text
    assert all(prompt.answer.replace(",", "").lstrip("-").isdigit() for prompt in found.prompts)


def test_nulls_inside_parquet_columns_are_bad_rows(load_file, tmp_path: Path, write_template):
    chats = [
        [{"role": "user", "content": "x"}],
        [{"role": "user", "content": None}],
        [None],
        None,
        [],
        [{"role": None}],
    ]
    models = [{"ground_truth": "1"}] * 5 + [None]
    pq.write_table(pa.table({"q": chats, "r": models}), tmp_path / "f.parquet")
    found = load_file("f.parquet", answer_key="r.ground_truth", chat_template=write_template(), on_bad_row="skip")
    assert (len(found.prompts), found.num_bad_rows) == (1, 5)
    assert "row 2: message 1 must have text under 'content', got None" in found.first_bad_row


def test_a_source_column_that_the_user_chose_must_exist_and_the_default_one_may_be_absent(load_file):
    assert load_file("f.jsonl", b'{"q": "x", "a": 1}\n').prompts[0].source == ""
    with pytest.raises(
        DataError, match=r"row 1: no 'origin', the row has q, a; name the column in eval.sets.s.source_key$"
    ):
        load_file("f.jsonl", b'{"q": "x", "a": 1}\n', source_key="origin", section="eval.sets.s")


SECTION = "warm_start.choose"


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"a": 1}, {}),
        ({"q": "x"}, {}),
        ({"q": ["x"], "a": 1}, {}),
        ({"q": "x", "a": 1}, {"answer_pattern": "#(.)"}),
        ({"q": "xyz", "a": 1}, {"max_prompt_tokens": 2, "on_long_prompt": "error"}),
        ({"q": "xyz", "a": 1}, {"max_prompt_tokens": 2}),
        ({"q": "xyz", "a": 1}, {"max_prompt_tokens": 2, "on_long_prompt": "drop"}),
        ({"q": "x", "a": 1}, {"chat_template": True}),
        ({"q": "x", "a": 1}, {"chat_template": "absent"}),
    ],
)
def test_messages_name_the_section_whose_key_must_change(load_file, row: dict, settings: dict):
    with pytest.raises((DataError, ConfigError)) as error:
        load_file("f.jsonl", json.dumps(row).encode(), section=SECTION, **settings)
    told = str(error.value)
    assert f"{SECTION}." in told and "\n" not in told
    assert "data." not in told.replace(SECTION, "")
