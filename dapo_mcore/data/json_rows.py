"""Rows of JSON text: one object a line (JSONL), or one array of objects. Strict: what JSON forbids, no row may have.

Change here: what a row of JSON may be, and how its mistakes are told. rows.py opens files and decompresses them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import IO, Any, NoReturn

from dapo_mcore.errors import DataError

_BOM = b"\xef\xbb\xbf"
_SPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Row:
    """One row. `where` is `train.jsonl row 3`, rows and lines counted from 1; `columns` is None for a broken row."""

    where: str
    columns: Mapping[str, Any] | None
    problem: str = ""


def read_json(file: IO[bytes], name: str) -> Iterator[Row]:
    """Yield the rows of JSON lines or of one JSON array, which begins with [. Blank lines are skipped, but counted.

    Raise DataError for an array whose rows cannot be told apart. Other mistakes are yielded as a Row with a problem.
    """
    for number, line in enumerate(file, start=1):
        text = line.removeprefix(_BOM) if number == 1 else line
        if not text.strip():
            continue
        rest = chain([(number, text)], enumerate(file, start=number + 1))
        if text.lstrip().startswith(b"["):
            yield from _rows_of_array(b"".join(line for _, line in rest), name, number)
        else:
            yield from _rows_of_lines(rest, name)


def _rows_of_lines(lines: Iterable[tuple[int, bytes]], name: str) -> Iterator[Row]:
    for number, line in lines:
        if line.strip():
            yield _row(f"{name} row {number}", line)


def _rows_of_array(content: bytes, name: str, first_line: int) -> Iterator[Row]:
    """Yield the elements of an array, each read as a line of JSONL is. The text is held in memory."""
    text = content.decode("utf-8", "surrogateescape")
    scan = json.JSONDecoder(parse_int=len, parse_float=len, strict=False).raw_decode  # only finds where an element ends
    number, place = 0, _skip(text, text.index("[") + 1)
    try:
        while number or text[place : place + 1] != "]":
            number += 1
            end = scan(text, place)[1]
            yield _row(f"{name} row {number}", text[place:end].encode("utf-8", "surrogateescape"))
            place = _skip(text, end)
            if text[place : place + 1] != ",":
                break
            place = _skip(text, place + 1)
    except (json.JSONDecodeError, RecursionError) as error:
        raise _broken_array(name, number, text, getattr(error, "pos", place), first_line, error) from error
    if text[place : place + 1] != "]":
        raise _broken_array(name, number, text, place, first_line, "Expecting ',' or ']' after a row")
    if (after := _skip(text, place + 1)) < len(text):
        raise _broken_array(name, number, text, after, first_line, "Extra text after the array's ]")


def _skip(text: str, place: int) -> int:
    """Return the first place from `place` on that is no white space."""
    while text[place : place + 1] and text[place] in _SPACE:
        place += 1
    return place


def _broken_array(name: str, number: int, text: str, place: int, first_line: int, error: Any) -> DataError:
    told = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    line = first_line + text.count("\n", 0, place)
    column = place - text.rfind("\n", 0, place)
    return DataError(
        f"{name} row {number}: not valid JSON: {told} (line {line} column {column}), so that the rows after it cannot be told "
        "apart; correct the array, or write one object per line (JSONL)"
    )


def _row(where: str, line: bytes) -> Row:
    try:
        columns = _parse(line)
    except (ValueError, RecursionError) as error:
        return Row(where, None, _problem(line, error))
    if isinstance(columns, dict):
        return Row(where, columns)
    return Row(where, None, f"a row must be a JSON object, not a {type(columns).__name__}")


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
    """Return one sentence about a row that cannot be parsed."""
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
    if isinstance(error, RecursionError):
        return f"not valid JSON: {told}"
    if line.lstrip().startswith(b"["):
        return f"not valid JSON: {told}; JSONL has one object per line: convert an array with jq -c '.[]'"
    if line.strip() == b"{":
        return f"not valid JSON: {told}; JSONL has one whole object per line: convert the file with jq -c ."
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
