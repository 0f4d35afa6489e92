"""JSON arrays: the rows and mistakes of the same JSONL, and a broken array says where."""

from __future__ import annotations

import io
import json
import random

import pytest

from dapo_mcore.data.json_rows import read_json
from dapo_mcore.errors import DataError

GOOD = b'{"q": "x", "a": 1}'

BROKEN = [
    b'{"q": "x", "q": "y"}',
    b'{"q": NaN}',
    b'{"q": [1e999]}',
    b'{"q": ' + b"1" * 5000 + b"}",
    b'{"q": "\xe9"}',
    rb'{"q": "\ud83d"}',
    b'{"q": "a\tb"}',
    b"[1]",
    b'"x"',
    b"null",
]


def rows(content: bytes):
    return list(read_json(io.BytesIO(content), "f.json"))


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_row_of_an_array_is_told_as_in_jsonl_and_the_next_one_is_read(broken: bytes):
    in_lines = rows(GOOD + b"\n" + broken + b"\n" + GOOD)
    in_array = rows(b"[" + GOOD + b",\n" + broken + b",\n " + GOOD + b"]")
    assert in_array == in_lines and [row.columns is None for row in in_array] == [False, True, False]
    assert in_array[1].where == "f.json row 2" and in_array[1].problem


@pytest.mark.parametrize("indent", [None, 0, 3])
def test_any_layout_of_an_array_has_the_same_rows(indent):
    draw = random.Random(0)
    made = [
        {"q": "".join(draw.choices('[]{},:"\\é中😀 \n', k=9)), "n": [draw.random(), {"k": None}]} for _ in range(50)
    ]
    assert [row.columns for row in rows(json.dumps(made, indent=indent).encode())] == made
    assert [row.columns for row in rows(json.dumps(made, indent=indent, ensure_ascii=False).encode())] == made


def test_an_empty_array_has_no_rows():
    assert rows(b"[]") == rows(b" \n[ \n ]\n") == rows(b"") == rows(b"\n\n") == []


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[%s,\n%s", r"row 2: not valid JSON: Expecting ',' or '\]' after a row \(line 2 column 19\)"),
        (b"\n[%s\n,%s, ", r"row 3: not valid JSON: Expecting value \(line 3 column 22\)"),
        (b"[%s %s]", r"row 1: .*Expecting ',' or '\]' after a row \(line 1 column 21\)"),
        (b"[%s,%s,]", r"row 3: not valid JSON: Expecting value \(line 1 column 40\)"),
        (b"[%s,%s]\n{}", r"Extra text after the array's \] \(line 2 column 1\)"),
        (b'[%s,{"q": %s]', r"row 2: not valid JSON: Expecting ',' delimiter"),
        (b"[%s,%s," + b"[" * 100_000, "row 3: not valid JSON: maximum recursion depth"),
    ],
)
def test_an_array_that_breaks_says_where_and_that_no_row_after_it_can_be_read(content: bytes, told: str):
    with pytest.raises(DataError, match=f"f.json {told}" if told.startswith("row") else told) as error:
        rows(content % (GOOD, GOOD))
    assert "cannot be told apart; correct the array, or write one object per line" in str(error.value)


def test_one_object_over_several_lines_is_told():
    (first, *_) = rows(json.dumps({"q": 1}, indent=1).encode())
    assert first.problem.endswith("JSONL has one whole object per line: convert the file with jq -c .")
