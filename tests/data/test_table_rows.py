"""Mistakes in CSV and Arrow files, with file and row. Whole files are in test_sources.py, parquet is in test_rows.py."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from dapo_mcore.data.rows import read_rows
from dapo_mcore.errors import DataError


def read(path: Path, content: bytes):
    path.write_bytes(content)
    return [(row.where.rpartition("/")[2], row.columns or row.problem) for row in read_rows([str(path)])]


def test_a_row_that_does_not_fit_its_header_is_a_broken_row_and_the_next_is_read(tmp_path: Path):
    found = read(tmp_path / "f.csv", b'q,a\nx,1\nx\nx,1,2\n\n"two\nlines","sa""id"\n\xe9,1\nx,\n')
    assert found == [
        ("f.csv row 1", {"q": "x", "a": "1"}),
        ("f.csv row 2", "the row has 1 values, but the first line names 2 columns"),
        ("f.csv row 3", "the row has 3 values, but the first line names 2 columns"),
        ("f.csv row 5", {"q": "two\nlines", "a": 'sa"id'}),
        ("f.csv row 6", "byte 0xe9 is not UTF-8; convert the file, for instance with iconv -f LATIN1 -t UTF-8"),
        ("f.csv row 7", {"q": "x", "a": ""}),
    ]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'q,a\nx,1\n"x"y,1\n', r"row 2 \(line 3\) is not CSV: ',' expected after '\"'; correct the row's quotes"),
        (b'q,a\n"x,1\n', r"row 1 \(line 2\) is not CSV: unexpected end of data"),
        (b"q,,\n", "must name each column once, but '' stands there 2 times"),
        (
            b"q;a\nx;1\n",
            r"one column, 'q;a'; is it separated by ';'\? Its name promises ',': write the file with that, or as",
        ),
        (b"q," + b"x" * 200_000, "is not CSV: field larger than field limit"),
    ],
)
def test_text_that_is_no_csv_ends_with_its_row(tmp_path: Path, content: bytes, told: str):
    with pytest.raises(DataError, match=told):
        read(tmp_path / "f.csv", content)


def test_an_arrow_file_is_read_as_a_stream_is(tmp_path: Path):
    table = pa.table({"q": ["x", "y", "z"]})
    with pa.OSFile(str(tmp_path / "f.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as batches:
        batches.write_table(table, max_chunksize=2)
    assert [row.columns for row in read_rows([str(tmp_path / "f.arrow")])] == table.to_pylist()


def test_a_damaged_arrow_stream_ends_with_the_last_row_read(tmp_path: Path):
    table = pa.table({"q": ["x"] * 6})
    with pa.OSFile(str(tmp_path / "whole"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=3)
    whole = (tmp_path / "whole").read_bytes()
    assert len(read(tmp_path / "f.arrow", whole)) == 6
    with pytest.raises(DataError, match=r"f.arrow cannot be read as Arrow after row 3: .*save_to_disk"):
        read(tmp_path / "f.arrow", whole[: len(whole) - 60])
    with pytest.raises(DataError, match="after row 0"):
        read(tmp_path / "f.arrow", b"PK no")
