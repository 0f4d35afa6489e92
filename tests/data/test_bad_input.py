"""Data that cannot be right: each ends in one line with file, row, rule and remedy, or is left out and counted."""

from __future__ import annotations

import gzip
import json
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dapo_mcore.config.sections import DataConfig
from dapo_mcore.data import chat
from dapo_mcore.data.prompts import PromptSet, load_prompts
from dapo_mcore.data.rows import check_files
from dapo_mcore.errors import ConfigError, DataError

FOLDER = Path(__file__).parent
GOOD = b'{"q": "x", "a": 1}\n'
PLAIN = {"prompt_key": "q", "answer_key": "a"}


@pytest.fixture
def load(tokenizer, tmp_path: Path):
    def load(name: str, content: bytes | None = None, section: str = "data", **settings) -> PromptSet:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        return load_prompts(DataConfig(files=[str(tmp_path / name)], **PLAIN | settings), tokenizer, section)

    return load


def message(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value), "a message has one line"
    return str(error.value)


ROWS = {
    b'{"q": "x", "q": "y", "a": 1}': "not valid JSON: the key 'q' occurs twice",
    b'{"q": "x", "a": 1, "more": {"k": 1, "k": 1}}': "the key 'k' occurs twice",
    b'{"q": "x", "a": NaN}': "JSON has no NaN",
    b'{"q": "x", "a": 1, "more": [-Infinity]}': "JSON has no -Infinity",
    b'{"q": "x", "a": 1, "more": 1e999}': "the number 1e999 is too large",
    b'{"q": "x", "a": ' + b"1" * 5000 + b"}": "not valid JSON: Exceeds the limit",
    b'{"q": "x", "a": "\xe9"}': "byte 18 (0xe9) is not UTF-8; convert the file, for instance with iconv -f LATIN1",
    rb'{"q": "x\ud83d", "a": 1}': r"\ud83d is half a surrogate pair, which is no character; write both halves",
    rb'{"q": "x", "a": "\uDE00"}': r"\ude00 is half",
    rb'{"q": "x", "a": 1, "deep": [{"\ud800": 1}]}': r"\ud800 is half",
    b'[{"q": "x", "a": 1},': "JSONL has one object per line: convert an array with jq -c '.[]'",
    b'{"q": 1': "row 2: not valid JSON: Expecting ',' delimiter (column 8);",
    b'{"q": "\xc3\xa9", a}': "not valid JSON: Expecting property name enclosed in double quotes (column 12);",
    b"[1]": "a row must be a JSON object, not a list",
    b'"x"': "not a str",
    b"null": "not a NoneType",
    b"{}": "no 'q', the row has nothing; name the column in data.prompt_key",
    b'{"q": "x", "a": {"b": 1}}': "must be text or an integer, got the dict",
}


@pytest.mark.parametrize("row", ROWS)
def test_a_row_that_cannot_be_right(load, row: bytes):
    with pytest.raises(DataError) as error:
        load("f.jsonl", GOOD + row + b"\n")
    assert "f.jsonl row 2: " in message(error) and ROWS[row] in message(error)
    assert message(error).endswith("; correct the row, or set data.on_bad_row skip")
    skipped = load("f.jsonl", GOOD + row + b"\n", on_bad_row="skip")
    assert (len(skipped.prompts), skipped.num_bad_rows) == (1, 1)
    assert skipped.warnings() == ["warning: 1 of 2 rows of data are unusable and left out"]


def test_escapes_that_are_text_are_text(load):
    (prompt,) = load("f.jsonl", rb'{"q": "\u0041\ud83d\ude00", "a": "\u00e9"}' + b"\n").prompts
    assert (prompt.text, prompt.answer) == ("A😀", "é")


def parquet(tmp_path: Path, **columns) -> bytes:
    pq.write_table(pa.table(columns), tmp_path / "made.parquet")
    return (tmp_path / "made.parquet").read_bytes()


FILES = {
    "absent.jsonl": (None, "no data file at"),
    "empty.jsonl": (b"", "no usable prompt in .*: data: 0 rows gave 0 prompts"),
    "blank.jsonl": (b"\n \n", "0 rows gave 0 prompts"),
    "train.csv": (b"q,a\n", "is neither JSONL .* nor parquet"),
    "train.jsonl.gz": (gzip.compress(GOOD), "is neither .*: it is compressed with gzip; decompress it with gunzip"),
    "gz.jsonl": (gzip.compress(GOOD), "is not JSONL: it is compressed with gzip; decompress it with gunzip"),
    "zip.jsonl": (b"PK\x03\x04 and more", "is not JSONL: it is a zip archive; unpack it"),
    "utf16.jsonl": (GOOD.decode().encode("utf-16"), "is not JSONL: it is UTF-16 text; .*iconv -f UTF-16 -t UTF-8"),
    "be.jsonl": (b"\xfe\xff" + GOOD.decode().encode("utf-16-be"), "UTF-16"),
    "no_bom.jsonl": (GOOD.decode().encode("utf-16-le"), "row 1: not valid JSON"),
    "p.jsonl": (b"PAR1 and more", "is not JSONL: it is parquet; let its name end in .parquet"),
    "j.parquet": (GOOD * 9, "as parquet after row 0: .* is it JSONL. Then let its name end in .jsonl"),
    "g.parquet": (gzip.compress(GOOD), "cannot be read as parquet after row 0: .*gunzip"),
    "none.parquet": (b"", "cannot be read as parquet after row 0: .*; give a parquet file"),
    "": (None, "is a folder; name the files in it"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_right(load, name: str):
    content, told = FILES[name]
    with pytest.raises(DataError, match=told) as error:
        load(name, content, on_bad_row="error")
    assert name[:20] in message(error)


def test_a_file_that_may_not_be_read(load, tmp_path: Path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    load("f.jsonl", GOOD)
    monkeypatch.setattr(Path, "open", refuse)
    told = r"f\.jsonl cannot be read: Permission denied; check the path and its permissions"
    with pytest.raises(DataError, match=told):
        load("f.jsonl")
    with pytest.raises(DataError, match=told):
        check_files([str(tmp_path / "f.jsonl")], "data")


def test_files_are_looked_at_before_a_run():
    check_files([str(FOLDER / "test_bad_input.py")], "data")
    for name, told in {"": "is a folder", "absent": "no data file", "n" * 300: "File name too long"}.items():
        with pytest.raises(DataError, match=told):
            check_files([str(FOLDER / name)], "eval.sets.s")


def test_a_byte_order_mark_is_no_part_of_the_first_row(load):
    assert len(load("f.jsonl", b"\xef\xbb\xbf" + GOOD).prompts) == 1


def test_damaged_parquet_is_an_error_or_read_never_a_crash(load, tmp_path: Path):
    whole = parquet(tmp_path, q=["ab", "c" * 40, "de"], a=[1, 2, 3], day=[date(2020, 1, 1)] * 3)
    assert len(load("f.parquet", whole).prompts) == 3
    outcomes = {"cut": 0, "flipped": 0}
    for place in range(0, len(whole), 7):
        damaged = {"cut": whole[:place], "flipped": whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]}
        for how, content in damaged.items():
            try:
                load("f.parquet", content, on_bad_row="skip")
            except DataError as error:
                outcomes[how] += 1
                assert "\n" not in str(error)
    assert outcomes["cut"] == len(range(0, len(whole), 7)) and outcomes["flipped"] > 20


def test_nulls_inside_parquet_columns_are_bad_rows(load, tmp_path: Path, jinja):
    chats = [
        [{"role": "user", "content": "x"}],
        [{"role": "user", "content": None}],
        [None],
        None,
        [],
        [{"role": None}],
    ]
    models = [{"ground_truth": "1"}] * 5 + [None]
    content = parquet(tmp_path, q=chats, r=models)
    found = load("f.parquet", content, answer_key="r.ground_truth", chat_template=jinja(), on_bad_row="skip")
    assert (len(found.prompts), found.num_bad_rows) == (1, 5)
    assert "row 2: message 1 must have text under 'content', got None" in found.first_bad_row


def test_a_chosen_source_column_must_be_there_and_the_default_one_need_not(load):
    assert load("f.jsonl", GOOD).prompts[0].source == ""
    with pytest.raises(
        DataError, match=r"row 1: no 'origin', the row has q, a; name the column in eval.sets.s.source_key;"
    ):
        load("f.jsonl", GOOD, source_key="origin", section="eval.sets.s")


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
def test_messages_name_the_section_whose_key_must_change(load, row: dict, settings: dict):
    with pytest.raises((DataError, ConfigError)) as error:
        load("f.jsonl", json.dumps(row).encode(), section=SECTION, **settings)
    assert f"{SECTION}." in message(error)
    assert "data." not in message(error).replace(SECTION, "")


@pytest.fixture
def jinja(tmp_path: Path):
    def jinja(source: str = "{% for m in messages %}{{ m.content }}{% endfor %}") -> str:
        (tmp_path / "t.jinja").write_text(source)
        return str(tmp_path / "t.jinja")

    return jinja


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
RECURSION = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}"


@pytest.mark.parametrize("source", [LOOP, RECURSION])
def test_a_template_that_never_ends_is_stopped(load, jinja, monkeypatch, source: str):
    monkeypatch.setattr(chat, "_TEMPLATE_CPU_S", 0.1)
    with pytest.raises(ConfigError, match=r"data.chat_template has not ended after 0.1 s of CPU time on .* row 1"):
        load("f.jsonl", GOOD, chat_template=jinja(source), on_bad_row="skip")


def test_a_template_that_explodes_is_stopped_before_it_is_tokenized(load, jinja, monkeypatch):
    monkeypatch.setattr(chat, "_MOST_CHARACTERS", 100)
    with pytest.raises(DataError, match="row 1: the chat template made 101 characters of the prompt, more than 100;"):
        load("f.jsonl", GOOD, chat_template=jinja("{% for i in range(101) %}{{ messages[0].content }}{% endfor %}"))


@pytest.mark.parametrize(
    "source", ["{{ 1 // 0 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ range(10**9) }}"]
)
def test_a_template_may_fail_in_any_way(load, jinja, source: str):
    with pytest.raises(DataError, match="row 1: the chat template refused the prompt: ") as error:
        load("f.jsonl", GOOD, chat_template=jinja(source))
    message(error)


def test_a_message_that_the_template_leaves_out_is_refused(load, jinja):
    source = (
        "{% for m in messages %}{% if m.role in ('user', 'assistant') %}[{{ m.content|upper }}]{% endif %}{% endfor %}"
    )
    row = {"q": [{"role": "user", "content": "a"}, {"role": "humen", "content": "b"}], "a": 1}
    with pytest.raises(
        DataError, match=r"row 1: the chat template leaves out message 2, whose role is 'humen'; correct"
    ):
        load("f.jsonl", json.dumps(row).encode(), chat_template=jinja(source))
    row["q"][1]["role"] = "user"
    assert load("f.jsonl", json.dumps(row).encode(), chat_template=jinja(source)).prompts[0].text == "[A][B]"


def test_named_templates_are_chosen_by_name(load, tokenizer, monkeypatch):
    named = {"plain": "{{ messages[0].content }}", "tool_use": "T{{ messages[0].content }}"}
    monkeypatch.setattr(tokenizer, "chat_template", named)
    with pytest.raises(
        ConfigError, match=r"none of the tokenizer's templates is named default; set .* plain, tool_use"
    ):
        load("f.jsonl", GOOD, chat_template=True)
    assert load("f.jsonl", GOOD, chat_template="tool_use").prompts[0].text == "Tx"
    with pytest.raises(
        ConfigError, match=r"'other' is not a file; .*, or one of the tokenizer's templates: plain, tool_use"
    ):
        load("f.jsonl", GOOD, chat_template="other")
    monkeypatch.setattr(tokenizer, "chat_template", {**named, "default": "D{{ messages[0].content }}"})
    assert load("f.jsonl", GOOD, chat_template=True).prompts[0].text == "Dx"


def test_a_template_file_that_is_no_text(load, tmp_path: Path):
    (tmp_path / "t.jinja").write_bytes(b"\xff\xfe{")
    for path in (tmp_path / "t.jinja", tmp_path):
        with pytest.raises(ConfigError, match=r"cannot be read: .*; give a Jinja file in UTF-8"):
            load("f.jsonl", GOOD, chat_template=str(path))
