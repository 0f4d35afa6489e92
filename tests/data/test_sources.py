"""Files, folders, globs and splits: every kind gives the rows of the same JSONL, and what is meant is never guessed."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dapo_mcore.data.rows import read_rows
from dapo_mcore.data.sources import format_of, sources
from dapo_mcore.errors import DataError

ROWS = [
    {"prompt": 'Say "é",\nthen 中', "answer": "007", "data_source": "a"},
    {"prompt": "2 + 2", "answer": "4.0", "data_source": ""},
    {"prompt": "a😀b", "answer": "x, y", "data_source": "b"},
]


def lines(rows=ROWS) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def table_text(folder: Path, delimiter: str) -> bytes:
    with (folder / "made").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    return (folder / "made").read_bytes()


def parquet(folder: Path) -> bytes:
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "made")
    return (folder / "made").read_bytes()


def arrow(folder: Path) -> bytes:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(folder / "made"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    return (folder / "made").read_bytes()


KINDS = {
    "rows.jsonl": lambda folder: lines(),
    "lines.json": lambda folder: lines(),
    "array.json": lambda folder: json.dumps(ROWS).encode(),
    "spread.json": lambda folder: (
        b"\xef\xbb\xbf\n " + json.dumps(ROWS, indent=2, ensure_ascii=False).encode() + b"\n\n"
    ),
    "rows.jsonl.gz": lambda folder: gzip.compress(lines(ROWS[:1])) + gzip.compress(lines(ROWS[1:])),
    "rows.jsonl.zst": lambda folder: zstd(lines(ROWS[:1])) + zstd(lines(ROWS[1:])),
    "array.json.zst": lambda folder: zstd(json.dumps(ROWS).encode()),
    "rows.csv": lambda folder: table_text(folder, ","),
    "bom.csv": lambda folder: b"\xef\xbb\xbf" + table_text(folder, ","),
    "rows.csv.gz": lambda folder: gzip.compress(table_text(folder, ",")),
    "rows.tsv": lambda folder: table_text(folder, "\t"),
    "rows.parquet": parquet,
    "rows.arrow": arrow,
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_has_the_rows_of_the_same_jsonl(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(KINDS[name](tmp_path))
    found = list(read_rows([str(tmp_path / name)]))
    assert [row.columns for row in found] == ROWS
    assert [row.where for row in found] == [f"{tmp_path / name} row {number}" for number in (1, 2, 3)]


def test_a_saved_data_set_has_the_rows_of_the_same_jsonl(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list(ROWS)
    one.select([2, 0, 1]).save_to_disk(tmp_path / "chosen", num_shards=2)
    datasets.DatasetDict(train=one, test=one).save_to_disk(tmp_path / "splits")
    assert [row.columns for row in read_rows([str(tmp_path / "chosen")])] == [ROWS[2], ROWS[0], ROWS[1]]
    assert [row.columns for row in read_rows([str(tmp_path / "splits" / "train")])] == ROWS
    with pytest.raises(
        DataError, match=rf"holds several splits of a data set; name one: {tmp_path}/splits/train, .*/test$"
    ):
        sources(str(tmp_path / "splits"))
    (tmp_path / "chosen" / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"state.json is broken: KeyError\('_data_files'\); save the data set again"):
        sources(str(tmp_path / "chosen"))


def made(folder: Path, *names: str) -> list[str]:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(json.dumps({"row": number}).encode())
    return [str(folder / name) for name in names]


def test_folders_and_globs_give_their_files_in_the_order_of_names(tmp_path: Path):
    b, a, deep, _, _ = made(tmp_path, "b.jsonl", "a.jsonl", "x/c.jsonl", "README.md", ".cache/d.jsonl")
    assert [source.name for source in sources(str(tmp_path))] == [a, b, deep]
    assert [source.name for source in sources(f"{tmp_path}/*.jsonl")] == [a, b]
    assert [source.name for source in sources(f"{tmp_path}/**/*.jsonl")] == [a, b, deep]
    assert [source.name for source in sources(f"{tmp_path}/[x]")] == [deep]
    assert [row.columns for row in read_rows([f"{tmp_path}/x", a])] == [{"row": 2}, {"row": 1}]
    with pytest.raises(DataError, match=r"no file matches .*/\*\.csv"):
        sources(f"{tmp_path}/*.csv")
    with pytest.raises(DataError, match=r"README.md is neither JSONL"):
        sources(f"{tmp_path}/*")
    (odd,) = made(tmp_path, "[x] odd.jsonl")
    assert [source.name for source in sources(odd)] == [odd]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (
            ("train.jsonl", "test.jsonl"),
            r"holds the splits test, train; name the files of one, for instance .*\*train\*",
        ),
        (("data/train-1.parquet", "data/validation-1.parquet"), "holds the splits train, validation"),
        (("train/a.csv", "dev/a.csv"), "holds the splits train, validation"),
        (("a.jsonl", "a.parquet"), r"holds files of \.jsonl, \.parquet; name those meant, for instance .*/\*\.jsonl"),
        (("a.jsonl", "b.jsonl.gz"), r"holds files of \.jsonl, \.jsonl\.gz"),
        (("notes.txt",), "is a folder without data files"),
    ],
)
def test_a_folder_whose_files_cannot_all_be_meant_is_refused(tmp_path: Path, names, told: str):
    made(tmp_path, *names)
    with pytest.raises(DataError, match=told):
        sources(str(tmp_path))


def test_words_that_only_contain_a_splits_name_are_no_splits(tmp_path: Path):
    assert len(sources(str(Path(made(tmp_path, "contest.jsonl", "training-a.jsonl", "evaluate.jsonl")[0]).parent))) == 3


def test_a_format_is_read_from_the_whole_suffix():
    known = {"a.json.gz": "json", "a.b.csv": "csv", "a.tsv.zst": "tsv", "A.parquet": "parquet", "a.arrow": "arrow"}
    assert {name: format_of(name) for name in known} == known
    assert {format_of(name) for name in ("a", "a.gz", "a.parquet.gz", "a.arrow.zst", "a.txt", "a.pkl", ".json")} == {""}
