"""The rows of JSONL and parquet files, one at a time, each with its file and number for error messages.

Change here: which file formats are read. prompts.py decides what a row must have.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dapo_mcore.errors import DataError

_FORMATS = {
    b"\x1f\x8b": "is compressed with gzip; decompress it with gunzip",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; decompress it with unzstd",
    b"PK\x03\x04": "is a zip archive; unpack it",
    b"\xff\xfe": "is UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "is UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8",
    b"PAR1": "is parquet; let its name end in .parquet",
}
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Row:
    """One row. `where` is `train.jsonl row 3`, rows and lines counted from 1; `columns` is None for a broken line."""

    where: str
    columns: Mapping[str, Any] | None
    problem: str = ""


def read_rows(files: Sequence[str]) -> Iterator[Row]:
    """Yield every row of the files in order. Blank JSONL lines are skipped, but counted as lines.

    Raise DataError for a file that is missing, unreadable or of another format, and for a broken parquet file. A broken
    JSONL line is yielded as a Row with a problem.
    """
    for file in files:
        path = Path(file)
        readers = {".jsonl": _read_jsonl, ".json": _read_jsonl, ".parquet": _read_parquet}
        try:
            begin = _begin(path)
            if path.suffix not in readers:
                raise DataError(f"{path} is neither JSONL (.jsonl, .json) nor parquet (.parquet){_hint(begin)}")
            if path.suffix != ".parquet" and (hint := _hint(begin)):
                raise DataError(f"{path} is not JSONL{hint}")
            yield from readers[path.suffix](path)
        except OSError as error:
            raise _unreadable(path, error) from error


def check_files(files: Sequence[str], section: str) -> None:
    """Raise DataError for a file that is missing or unreadable. `section` names its section, `eval.sets.aime` say."""
    for path in map(Path, files):
        try:
            _begin(path)
        except OSError as error:
            raise _unreadable(path, error) from error
        except DataError as error:
            raise DataError(f"{error}; correct {section}.files, or make the file first") from error


def lookup(columns: Mapping[str, Any], key: str) -> Any:
    """Return the value of a column, or of a dotted path into nested objects. Raise KeyError if it is missing."""
    if key in columns:
        return columns[key]
    value: Any = columns
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise KeyError(key)
        value = value[part]
    return value


def _unreadable(path: Path, error: OSError) -> DataError:
    """Return the error for a file that the system refuses: permissions, a name that is too long, a failing disk."""
    return DataError(f"{path} cannot be read: {error.strerror or error}; check the path and its permissions")


def _begin(path: Path) -> bytes:
    """Return the file's first four bytes. Raise DataError if there is no file."""
    if path.is_dir():
        raise DataError(f"{path} is a folder; name the files in it")
    if not path.is_file():
        raise DataError(f"no data file at {path}")
    with path.open("rb") as file:
        return file.read(4)


def _hint(begin: bytes) -> str:
    """Return what the file is by its first bytes, and what to do about it; empty for an unknown format."""
    return next((f": it {what}" for magic, what in _FORMATS.items() if begin.startswith(magic)), "")


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(_BOM)
            if not line.strip():
                continue
            where = f"{path} row {number}"
            try:
                columns = _parse(line)
            except (ValueError, RecursionError) as error:
                yield Row(where, None, _problem(line, error))
                continue
            if isinstance(columns, dict):
                yield Row(where, columns)
            else:
                yield Row(where, None, f"a row must be a JSON object, not a {type(columns).__name__}")


def _parse(line: bytes) -> Any:
    """Return the value of a line of strict JSON. Raise ValueError, also for errors that Python's parser accepts."""
    columns = json.loads(
        line.decode("utf-8").rstrip("\r\n"),
        object_pairs_hook=_without_repeats,
        parse_constant=_no_number,
        parse_float=_finite,
    )
    if b"\\u" in line:  # only an escape can give half a surrogate pair, which cannot be written or tokenized
        json.dumps(columns, ensure_ascii=False).encode("utf-8")
    return columns


def _problem(line: bytes, error: Exception) -> str:
    """Return one sentence about a line that cannot be parsed."""
    if isinstance(error, UnicodeDecodeError):
        return (
            f"byte {error.start + 1} (0x{line[error.start]:02x}) is not UTF-8; "
            "convert the file, for instance with iconv -f LATIN1 -t UTF-8"
        )
    if isinstance(error, UnicodeEncodeError):
        return (
            f"\\u{ord(error.object[error.start]):04x} is half a surrogate pair, which is no character; "
            "write both halves or neither"
        )
    # json counts lines within the row, which is always line 1
    told = f"{error.msg} (column {error.pos + 1})" if isinstance(error, json.JSONDecodeError) else str(error)
    if line.lstrip().startswith(b"[") and not isinstance(error, RecursionError):
        return f"not valid JSON: {told}; JSONL has one object per line: convert an array with jq -c '.[]'"
    return f"not valid JSON: {told}"


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    columns = dict(pairs)
    if len(columns) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r:.80} occurs twice")
    return columns


def _no_number(literal: str) -> NoReturn:
    raise ValueError(f"JSON has no {literal}")


def _finite(literal: str) -> float:
    if not math.isfinite(value := float(literal)):
        raise ValueError(f"the number {literal:.40} is too large")
    return value


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=4096):
                for columns in batch.to_pylist():
                    number += 1
                    yield Row(f"{path} row {number}", columns)
    except Exception as error:  # damaged bytes cause nearly any exception: bad text, dates out of range, no memory
        told = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path} cannot be read as parquet after row {number}: {told}{_parquet_hint(_begin(path))}"
        ) from error


def _parquet_hint(begin: bytes) -> str:
    if begin[:1] == b"{":
        return "; is it JSONL? Then let its name end in .jsonl"
    return "; get the file again" if begin == b"PAR1" else _hint(begin) or "; give a parquet file"
