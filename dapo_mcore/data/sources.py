"""The files that an entry of `data.files` means: a file, a folder, a glob, or a split of a data set on the hub.

Change here: what an entry may be and how its files are found. rows.py reads them.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dapo_mcore.data.hub_split import PREFIX, is_hub_split, lacks_prefix, split_files
from dapo_mcore.errors import DataError

ARROW = "arrow"
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
"""What pyarrow calls a compression, by a file's suffix."""
_FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": ARROW,
}
_NOT_COMPRESSED = ("parquet", ARROW)
_KNOWN = (
    "JSONL (.jsonl, .json), a JSON array (.json), CSV (.csv, .tsv), each also as .gz or .zst, nor parquet (.parquet)"
)
_BEGINNINGS = {
    b"\x1f\x8b": "is compressed with gzip; let its name end in .gz, or decompress it with gunzip",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; let its name end in .zst, or decompress it with unzstd",
    b"PK\x03\x04": "is a zip archive; unpack it",
    b"\xff\xfe": "is UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "is UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8",
    b"PAR1": "is parquet; let its name end in .parquet",
}
_SPLITS = {
    "train": r"train(ing)?",
    "test": r"test(ing)?|eval(uation)?",
    "validation": r"valid(ation)?|val|dev",
}
_NAME_BORDER = r"(?:^|[^a-zA-Z])(?:{})(?:[^a-zA-Z]|$)"


@dataclass(frozen=True, slots=True)
class Source:
    """A file of rows. `name` is what messages call it: its path, or where the hub has it."""

    path: Path
    name: str


def sources(entry: str) -> list[Source]:
    """Return the files of an entry, those of folders and globs sorted by name.

    Raise DataError if there is none, for a file of a format that is not read, and for a folder in which not all files can be meant
    together.
    """
    if is_hub_split(entry):
        return [_known(path, name) for path, name in split_files(entry)]
    path = Path(entry)
    if path.exists() or not glob.has_magic(entry):
        return _sources_at(path)
    found = sorted(map(Path, glob.glob(entry, recursive=True)))
    if not found:
        raise DataError(f"no file matches {entry}")
    return [source for each in found for source in _sources_at(each)]


def format_of(name: str) -> str:
    """Return the format that a file's name says, or an empty text for one that is not read."""
    path = Path(name)
    is_compressed = path.suffix in COMPRESSED
    form = _FORMATS.get(Path(path.stem).suffix if is_compressed else path.suffix, "")
    return "" if is_compressed and form in _NOT_COMPRESSED else form


def begin_of(path: Path) -> bytes:
    """Return the file's first four bytes."""
    with path.open("rb") as file:
        return file.read(4)


def hint(begin: bytes) -> str:
    """Return what a file is by its first bytes, and what to do about it; empty for an unknown format."""
    return next((f": it {what}" for magic, what in _BEGINNINGS.items() if begin.startswith(magic)), "")


def _sources_at(path: Path) -> list[Source]:
    if path.is_dir():
        return [Source(file, str(file)) for file in _files_of_folder(path)]
    if not path.is_file():
        on_hub = f"; a data set on the hub is {PREFIX}{path}" if lacks_prefix(str(path)) else ""
        raise DataError(f"no data file at {path}{on_hub}")
    return [_known(path, str(path))]


def _known(path: Path, name: str) -> Source:
    if not format_of(path.name):
        raise DataError(f"{name} is neither {_KNOWN}{hint(begin_of(path))}")
    return Source(path, name)


def _files_of_folder(folder: Path) -> list[Path]:
    """Return the data files in a folder and below it, or those of a data set that save_to_disk has written."""
    if (folder / "dataset_dict.json").is_file():
        splits = _read(folder / "dataset_dict.json", "splits")
        listed = ", ".join(str(folder / split) for split in splits)
        raise DataError(f"{folder} holds several splits of a data set; name one: {listed}")
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return [folder / file["filename"] for file in _read(folder / "state.json", "_data_files")]
    below = [path for path in folder.rglob("*") if not any(p.startswith(".") for p in path.relative_to(folder).parts)]
    files = sorted(path for path in below if path.is_file() and format_of(path.name))
    if not files:
        raise DataError(
            f"{folder} is a folder without data files; name the files, which are {_KNOWN.replace(' nor', ' or')}"
        )
    _check_alike(folder, files)
    return files


def _check_alike(folder: Path, files: Iterable[Path]) -> None:
    """Raise DataError for files of several formats or splits: which ones are meant must be said."""
    formats = sorted({"".join(path.suffixes[-2:]) if path.suffix in COMPRESSED else path.suffix for path in files})
    if len(formats) > 1:
        raise DataError(
            f"{folder} holds files of {', '.join(formats)}; name those meant, for instance {folder}/*{formats[0]}"
        )
    splits = sorted({split for path in files for split in _splits_of(str(path.relative_to(folder)))})
    if len(splits) > 1:
        raise DataError(
            f"{folder} holds the splits {', '.join(splits)}; name the files of one, for instance {folder}/*train*"
        )


def _splits_of(name: str) -> set[str]:
    """Return the splits that a file's name mentions, by the words that `datasets` knows."""
    return {split for split, words in _SPLITS.items() if re.search(_NAME_BORDER.format(words), name)}


def _read(path: Path, key: str) -> list:
    try:
        return json.loads(path.read_bytes())[key]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is broken: {error!r}; save the data set again") from error
