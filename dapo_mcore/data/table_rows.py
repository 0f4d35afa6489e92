"""Rows of tables: parquet, Arrow (streams, as `datasets` saves them, and files) and CSV.

Change here: how a table's cells become a row's values. rows.py decides by the file's name which reader reads it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from dapo_mcore.data.json_rows import Row
from dapo_mcore.data.sources import begin_of, hint
from dapo_mcore.errors import DataError, one_line

if TYPE_CHECKING:
    import pyarrow as pa

_ARROW_FILE = b"ARRO"
"""First bytes of an Arrow file."""
_OTHER_DELIMITERS = ",;\t|"


def read_parquet(path: Path, name: str) -> Iterator[Row]:
    """Yield the rows of a parquet file. Raise DataError for a damaged one, with the last row that could be read."""
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=4096):
                for columns in batch.to_pylist():
                    number += 1
                    yield Row(f"{name} row {number}", columns)
    except Exception as error:  # damaged bytes cause nearly any exception: bad text, dates out of range, no memory
        raise DataError(
            f"{name} cannot be read as parquet after row {number}: {one_line(error)}{_parquet_hint(path)}"
        ) from error


def read_arrow(path: Path, name: str) -> Iterator[Row]:
    """Yield the rows of an Arrow stream or file. Raise DataError for a damaged one, with the last row that could be read."""
    import pyarrow as pa

    number = 0
    try:
        with pa.memory_map(str(path)) as file:
            for batch in _batches(file, is_file=begin_of(path) == _ARROW_FILE):
                for columns in batch.to_pylist():
                    number += 1
                    yield Row(f"{name} row {number}", columns)
    except Exception as error:
        raise DataError(
            f"{name} cannot be read as Arrow after row {number}: {one_line(error)}; give a folder that datasets' save_to_disk has "
            "written, or get the file again"
        ) from error


def _batches(file: pa.NativeFile, is_file: bool) -> Iterator[pa.RecordBatch]:
    """Yield the batches of an Arrow file, which has an index of them, or of a stream, which has none."""
    import pyarrow as pa

    if not is_file:
        yield from pa.ipc.open_stream(file)
        return
    batches = pa.ipc.open_file(file)
    yield from map(batches.get_batch, range(batches.num_record_batches))


def read_csv(file: IO[bytes], name: str, delimiter: str = ",") -> Iterator[Row]:
    """Yield the rows below the header of a CSV file. Every value is text as it stands: no number loses its zeros.

    Raise DataError for a header that does not name each column once, and for text that is not CSV.
    """
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
    records = csv.reader(text, delimiter=delimiter, strict=True)
    number = 0
    try:
        header = next(records, [])
        _check_header(header, name, delimiter)
        for number, record in enumerate(records, start=1):
            if record:
                yield _record(f"{name} row {number}", header, record)
    except csv.Error as error:
        raise DataError(
            f"{name} row {number + 1} (line {records.line_num}) is not CSV: {error}; correct the row's quotes, or write "
            "the file as JSONL"
        ) from error


def _check_header(header: list[str], name: str, delimiter: str) -> None:
    other = next((sign for sign in _OTHER_DELIMITERS if sign in header[0]), "") if len(header) == 1 else ""
    if other:
        raise DataError(
            f"{name}: its first line names one column, {header[0]!r:.80}; is it separated by {other!r}? Its name promises "
            f"{delimiter!r}: write the file with that, or as JSONL"
        )
    twice = sorted({column for column in header if header.count(column) > 1 or not column})
    if twice:
        raise DataError(
            f"{name}: its first line must name each column once, but {twice[0]!r} stands there {header.count(twice[0])} "
            "times; correct the line"
        )


def _record(where: str, header: list[str], record: list[str]) -> Row:
    if len(record) != len(header):
        return Row(where, None, f"the row has {len(record)} values, but the first line names {len(header)} columns")
    wrong = next((value for value in record if not value.isprintable() and _byte(value)), "")
    if wrong:
        return Row(
            where,
            None,
            f"byte 0x{_byte(wrong)} is not UTF-8; convert the file, for instance with iconv -f LATIN1 -t UTF-8",
        )
    return Row(where, dict(zip(header, record)))


def _byte(text: str) -> str:
    """Return the first byte that was not UTF-8, as two hexadecimal digits, or an empty text."""
    return next((f"{ord(sign) - 0xDC00:02x}" for sign in text if 0xDC80 <= ord(sign) <= 0xDCFF), "")


def _parquet_hint(path: Path) -> str:
    begin = begin_of(path)
    if begin[:1] == b"{":
        return "; is it JSONL? Then let its name end in .jsonl"
    return "; get the file again" if begin == b"PAR1" else hint(begin) or "; give a parquet file"
