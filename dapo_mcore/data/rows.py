"""The rows of data files, one at a time, each with its file and number for error messages.

Change here: which file formats are read. json_rows.py and table_rows.py read them, sources.py finds the files, and prompts.py
decides what a row must have.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, cast

from dapo_mcore.data.hub_split import is_hub_split
from dapo_mcore.data.json_rows import Row as Row
from dapo_mcore.data.json_rows import read_json
from dapo_mcore.data.sources import ARROW, COMPRESSED, Source, begin_of, format_of, hint, sources
from dapo_mcore.data.table_rows import read_arrow, read_csv, read_parquet
from dapo_mcore.errors import DataError

_TEXT_FORMATS = {"json": "JSONL", "csv": "CSV", "tsv": "CSV"}


def read_rows(files: Sequence[str]) -> Iterator[Row]:
    """Yield every row of the files in order. Blank lines are skipped, but counted as lines.

    files  entries of `files` in a data section: files, folders, globs, data sets of the hub.
    Raise DataError for a file that is missing, unreadable or of another format, and for a file that breaks off. A broken row of
    a file that goes on is yielded as a Row with a problem.
    """
    for entry in files:
        name = entry
        try:
            for source in sources(entry):
                name = source.name
                yield from _read(source)
        except OSError as error:
            raise _unreadable(name, error) from error


def check_files(files: Sequence[str], section: str) -> None:
    """Raise DataError for a file that is missing or unreadable. `section` names its section, `eval.sets.aime` say."""
    for entry in files:
        try:
            for source in sources(entry):
                begin_of(source.path)
        except OSError as error:
            raise _unreadable(entry, error) from error
        except DataError as error:
            remedy = "" if is_hub_split(entry) else ", or make the file first"
            raise DataError(f"{error}; correct {section}.files{remedy}") from error


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


def _read(source: Source) -> Iterator[Row]:
    path, name = source.path, source.name
    form, begin = format_of(path.name), begin_of(path)
    if form == "parquet":
        yield from read_parquet(path, name)
    elif form == ARROW:
        yield from read_arrow(path, name)
    else:
        with _opened(source, begin) as file:
            yield from read_json(file, name) if form == "json" else read_csv(file, name, "\t" if form == "tsv" else ",")


def _opened(source: Source, begin: bytes) -> IO[bytes]:
    """Return the file's bytes, decompressed if its name says so. Raise DataError for bytes of another format."""
    compression = COMPRESSED.get(source.path.suffix)
    if compression is None:
        if told := hint(begin):
            raise DataError(f"{source.name} is not {_TEXT_FORMATS[format_of(source.path.name)]}{told}")
        return source.path.open("rb")
    import pyarrow as pa

    return io.BufferedReader(cast(Any, pa.input_stream(str(source.path), compression=compression)))


def _unreadable(name: str, error: OSError) -> DataError:
    """Return the error for a file that the system refuses (permissions, a name that is too long, a failing disk), or that cannot be
    decompressed: such an error has no number."""
    remedy = "get the file again, or correct its name" if error.errno is None else "check the path and its permissions"
    return DataError(f"{name} cannot be read: {error.strerror or error}; {remedy}")
