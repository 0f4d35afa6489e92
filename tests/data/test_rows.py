"""Rows of JSONL and parquet files. Unusable ones end in one line with file, row, rule and remedy, or are counted."""

from __future__ import annotations

import gzip
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dapo_mcore.data.rows import Row, check_files, lookup, read_rows
from dapo_mcore.errors import DataError

FOLDER = Path(__file__).parent


GOOD = b'{"q": "x", "a": 1}\n'


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


def test_a_column_that_the_first_row_lacks_is_to_be_named(load_file):
    with pytest.raises(DataError) as error:
        load_file("f.jsonl", b'{"Q": "x", "a": "1"}\n')
    assert message(error).endswith("no 'q', the row has Q, a; name the column in data.prompt_key")


@pytest.mark.parametrize("row", ROWS)
def test_a_broken_row_is_refused_or_skipped_and_counted(load_file, row: bytes):
    with pytest.raises(DataError) as error:
        load_file("f.jsonl", GOOD + row + b"\n")
    assert "f.jsonl row 2: " in message(error) and ROWS[row] in message(error)
    assert message(error).endswith("; correct the row, or set data.on_bad_row skip")
    skipped = load_file("f.jsonl", GOOD + row + b"\n", on_bad_row="skip")
    assert (len(skipped.prompts), skipped.num_bad_rows) == (1, 1)
    assert skipped.warnings() == ["warning: 1 of 2 rows of data are unusable and left out"]


def test_json_escapes_are_decoded(load_file):
    (prompt,) = load_file("f.jsonl", rb'{"q": "\u0041\ud83d\ude00", "a": "\u00e9"}' + b"\n").prompts
    assert (prompt.text, prompt.answer) == ("A😀", "é")


def parquet(tmp_path: Path, **columns) -> bytes:
    pq.write_table(pa.table(columns), tmp_path / "made.parquet")
    return (tmp_path / "made.parquet").read_bytes()


FILES = {
    "absent.jsonl": (None, "no data file at"),
    "empty.jsonl": (b"", "no usable prompt in .*: data: 0 rows gave 0 prompts"),
    "blank.jsonl": (b"\n \n", "0 rows gave 0 prompts"),
    "train.xlsx": (b"PK\x03\x04", "is neither JSONL .* nor parquet .*: it is a zip archive; unpack it"),
    "train.parquet.gz": (
        gzip.compress(GOOD),
        "is neither .*: it is compressed with gzip; .* decompress it with gunzip",
    ),
    "empty.csv": (b"", "0 rows gave 0 prompts"),
    "header.csv": (b"q,a\n", "0 rows gave 0 prompts"),
    "twice.csv": (
        b"q,q,a\n",
        "its first line must name each column once, but 'q' stands there 2 times; correct the line",
    ),
    "gz.csv": (gzip.compress(GOOD), "is not CSV: it is compressed with gzip"),
    "text.jsonl.gz": (GOOD, "cannot be read: zlib inflate failed"),
    "cut.jsonl.gz": (
        gzip.compress(GOOD * 9)[:-12],
        "cannot be read: Truncated compressed stream; get the file again, or correct its name",
    ),
    "gz.jsonl": (
        gzip.compress(GOOD),
        "is not JSONL: it is compressed with gzip; let its name end in .gz, or decompress it with gunzip",
    ),
    "zip.jsonl": (b"PK\x03\x04 and more", "is not JSONL: it is a zip archive; unpack it"),
    "utf16.jsonl": (GOOD.decode().encode("utf-16"), "is not JSONL: it is UTF-16 text; .*iconv -f UTF-16 -t UTF-8"),
    "be.jsonl": (b"\xfe\xff" + GOOD.decode().encode("utf-16-be"), "UTF-16"),
    "no_bom.jsonl": (GOOD.decode().encode("utf-16-le"), "row 1: not valid JSON"),
    "p.jsonl": (b"PAR1 and more", "is not JSONL: it is parquet; let its name end in .parquet"),
    "j.parquet": (GOOD * 9, "as parquet after row 0: .* is it JSONL. Then let its name end in .jsonl"),
    "g.parquet": (gzip.compress(GOOD), "cannot be read as parquet after row 0: .*gunzip"),
    "none.parquet": (b"", "cannot be read as parquet after row 0: .*; give a parquet file"),
    "": (None, "is a folder without data files; name the files, which are JSONL"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_format_is_named_with_what_to_do(load_file, name: str):
    content, told = FILES[name]
    with pytest.raises(DataError, match=told) as error:
        load_file(name, content, on_bad_row="error")
    assert name[:20] in message(error)


def test_a_file_without_read_permission_is_named(load_file, tmp_path: Path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    load_file("f.jsonl", GOOD)
    monkeypatch.setattr(Path, "open", refuse)
    told = r"f\.jsonl cannot be read: Permission denied; check the path and its permissions"
    with pytest.raises(DataError, match=told):
        load_file("f.jsonl")
    with pytest.raises(DataError, match=told):
        check_files([str(tmp_path / "f.jsonl")], "data")


def test_files_are_checked_before_a_run(tmp_path: Path):
    (tmp_path / "given.jsonl").write_bytes(GOOD)
    check_files([str(tmp_path / "given.jsonl"), f"{tmp_path}/*.jsonl"], "data")
    for name, told in {"": "is a folder", "absent": "no data file", "n" * 300: "File name too long"}.items():
        with pytest.raises(DataError, match=told):
            check_files([str(FOLDER / name)], "eval.sets.s")


def test_a_byte_order_mark_is_no_part_of_the_first_row(load_file):
    assert len(load_file("f.jsonl", b"\xef\xbb\xbf" + GOOD).prompts) == 1


def test_damaged_parquet_is_either_read_or_a_data_error(load_file, tmp_path: Path):
    whole = parquet(tmp_path, q=["ab", "c" * 40, "de"], a=[1, 2, 3], day=[date(2020, 1, 1)] * 3)
    assert len(load_file("f.parquet", whole).prompts) == 3
    outcomes = {"cut": 0, "flipped": 0}
    for place in range(0, len(whole), 7):
        damaged = {"cut": whole[:place], "flipped": whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]}
        for how, content in damaged.items():
            try:
                load_file("f.parquet", content, on_bad_row="skip")
            except DataError as error:
                outcomes[how] += 1
                assert "\n" not in str(error)
    assert outcomes["cut"] == len(range(0, len(whole), 7)) and outcomes["flipped"] > 20


def test_rows_know_their_file_and_their_number(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"q": 1}\n\n{"q"\n{"q": 2}')
    pq.write_table(pa.table({"q": [3, 4]}), tmp_path / "b.parquet")
    one, broken, two, three, four = read_rows([str(tmp_path / "a.jsonl"), str(tmp_path / "b.parquet")])
    assert (one, two) == (Row(f"{tmp_path}/a.jsonl row 1", {"q": 1}), Row(f"{tmp_path}/a.jsonl row 4", {"q": 2}))
    assert (three, four) == (Row(f"{tmp_path}/b.parquet row 1", {"q": 3}), Row(f"{tmp_path}/b.parquet row 2", {"q": 4}))
    assert (broken.where, broken.columns) == (f"{tmp_path}/a.jsonl row 3", None)
    assert broken.problem.startswith("not valid JSON: Expecting ':' delimiter (column ")


def test_a_dotted_key_descends_unless_a_column_has_the_whole_name():
    columns = {"a.b": 1, "a": {"b": 2, "c": {"d": 3}}, "e": None}
    assert [lookup(columns, key) for key in ("a.b", "a.c.d", "e")] == [1, 3, None]
    for missing in ("b", "a.d", "a.c.d.e", "e.f"):
        with pytest.raises(KeyError, match=missing):
            lookup(columns, missing)
