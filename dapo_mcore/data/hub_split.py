"""A split of a data set on the hub: `hf://ORG/NAME[@REVISION][/CONFIG]:SPLIT`, as files.

Change here: how such an entry is written, and which files of a repository are downloaded. `datasets` decides which of them are a
split; the rows are read from the files themselves, so that they are checked as those of any file.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from dapo_mcore.errors import ConfigError, DataError, one_line
from dapo_mcore.hub import HubRepo, download

PREFIX = "hf://"
_ENTRY = re.compile(
    r"hf://(?:datasets/)?(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+?))?(?:/(?P<config>[^/:@]+))?:(?P<split>[\w.-]+)",
    re.ASCII,
)
_README = "README.md"
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_PATTERNS = tuple(f"*{suffix}{compression}" for suffix in _SUFFIXES for compression in ("", ".gz", ".zst"))


def is_hub_split(entry: str) -> bool:
    """Return True if an entry of `files` names a data set on the hub."""
    return entry.startswith(PREFIX)


def lacks_prefix(entry: str) -> bool:
    """Return True if hf:// is all that an entry lacks to name a split: `openai/gsm8k/main:train`."""
    return _ENTRY.fullmatch(PREFIX + entry) is not None


@cache
def split_files(entry: str) -> tuple[tuple[Path, str], ...]:
    """Return the files of a split, downloaded, and what messages call each.

    Raise DataError for an entry that is written otherwise, and an unknown configuration or split; ConfigError as hub.download does,
    and where `datasets` is not installed. Found once per process, so that its rows cannot change meanwhile.
    """
    found = _ENTRY.fullmatch(entry)
    if found is None:
        raise DataError(
            f"{entry} names no split of a data set on the hub; write hf://ORG/NAME:SPLIT, for instance hf://openai/gsm8k/main:train "
            "with its configuration, or hf://ORG/NAME@REVISION:SPLIT"
        )
    name, revision, config, split = found["name"], found["revision"], found["config"], found["split"]
    _check_installed(entry)
    repo = HubRepo("dataset", name, revision, entry)
    patterns = _patterns(download(repo, [_README]), config)
    folder = download(repo, [_README, *patterns], ["*/.*", ".*"])
    splits = _splits(entry, folder, config)
    if split not in splits:
        raise DataError(f"{entry}: the data set has no split {split}; it has {', '.join(splits)}")
    return tuple((path, f"hf://{name}/{path.relative_to(folder)}") for path in splits[split])


def _check_installed(entry: str) -> None:
    from importlib.util import find_spec

    if find_spec("datasets") is None:
        raise ConfigError(
            f"{entry} needs the package datasets, which says which files a split has: pip install 'dapo_mcore[datasets]', or "
            "download the data set and name its files"
        )


def _patterns(folder: Path, config: str | None) -> list[str]:
    """Return patterns of the configuration's files, as the README's header has them, or those of all data files."""
    from huggingface_hub import metadata_load

    readme = folder / _README
    header: Any = metadata_load(readme) if readme.is_file() else None
    configs = [one for one in (header or {}).get("configs", ()) if isinstance(one, dict)]
    default = next((one for one in configs if one.get("default")), configs[0] if len(configs) == 1 else {})
    chosen = next((one for one in configs if one.get("config_name") == config), {}) if config else default
    named = list(_paths(chosen.get("data_files", ())))
    return [f"{chosen['data_dir']}/{path}" for path in named] if chosen.get("data_dir") else named or [*_PATTERNS]


def _paths(data_files: Any) -> list[str]:
    """Return the paths in a text, a list of texts, or a list of {split, path}."""
    if isinstance(data_files, dict):
        return _paths(data_files.get("path", ()))
    return [data_files] if isinstance(data_files, str) else [path for part in data_files for path in _paths(part)]


def _splits(entry: str, folder: Path, config: str | None) -> dict[str, list[Path]]:
    """Return the files of each split of a downloaded data set."""
    from datasets import load_dataset_builder

    try:
        found = load_dataset_builder(str(folder), config).config.data_files or {}
    except Exception as error:  # its own errors have no common base
        raise DataError(
            f"{entry}: datasets cannot tell its splits: {_told(error)}; a configuration is named as hf://ORG/NAME/CONFIG:SPLIT"
        ) from error
    return {str(split): [Path(file) for file in files] for split, files in found.items()}


def _told(error: Exception) -> str:
    """Return the message without datasets' example, which calls load_dataset with the cache's folder."""
    return one_line(str(error).partition("Example of usage")[0] or error, 400)
