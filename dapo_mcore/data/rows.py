"""The rows of JSONL and parquet files, one at a time, each with its place for error messages.

Change here: which file formats are read. What a row must hold is decided in prompts.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo_mcore.errors import DataError


@dataclass(frozen=True, slots=True)
class Row:
    """One row. `where` is `train.jsonl row 3`, rows and lines counted from 1; `columns` is None for a broken line."""

    where: str
    columns: Mapping[str, Any] | None
    problem: str = ""


def read_rows(files: Sequence[str]) -> Iterator[Row]:
    """Every row of the files in order; blank JSONL lines are no rows, but count as lines.

    Raises DataError for a missing file, an unknown suffix or a broken parquet file; a broken JSONL line is yielded.
    """
    for file in files:
        path = Path(file)
        if not path.is_file():
            raise DataError(f"no data file at {path}")
        readers = {".jsonl": _read_jsonl, ".json": _read_jsonl, ".parquet": _read_parquet}
        if path.suffix not in readers:
            raise DataError(f"{path} is neither JSONL (.jsonl, .json) nor parquet (.parquet)")
        yield from readers[path.suffix](path)


def lookup(columns: Mapping[str, Any], key: str) -> Any:
    """The value under a column name, else under a dotted path into nested objects. Raises KeyError when absent."""
    if key in columns:
        return columns[key]
    value: Any = columns
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise KeyError(key)
        value = value[part]
    return value


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path} row {number}"
            try:
                columns = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield Row(where, None, f"not valid JSON: {error}")
                continue
            if isinstance(columns, dict):
                yield Row(where, columns)
            else:
                yield Row(where, None, f"a row must be a JSON object, not a {type(columns).__name__}")


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                for columns in batch.to_pylist():
                    number += 1
                    yield Row(f"{path} row {number}", columns)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet after row {number}: {error}") from error
