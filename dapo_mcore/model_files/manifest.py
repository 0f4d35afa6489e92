"""manifest.json: the size and SHA-256 of each file of a folder, so that damage is found before a file is used.

Change here: how files are hashed. Files of tensors have their size only: their index has checksums of what it names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dapo_mcore.errors import DamagedCheckpoint

MANIFEST = "manifest.json"


def write_manifest(folder: Path, files: Iterable[Path], tensor_files: Mapping[Path, int]) -> None:
    """Write the manifest of these files, which lie in `folder`. Of `tensor_files` the sizes are given: a network disk may not
    show yet what another machine has written."""
    entries: dict[str, Any] = {_name(path, folder): [path.stat().st_size, _sha256(path)] for path in files}
    entries |= {_name(path, folder): [size, None] for path, size in tensor_files.items()}
    (folder / MANIFEST).write_text(json.dumps({"files": entries}, indent=1), encoding="utf-8")


def check_manifest(folder: Path, only: str | None = None) -> None:
    """Raise DamagedCheckpoint for a file that is missing, truncated or changed, and OSError if the system refuses one.

    Reads all files but those of tensors, or `only` the one of this name.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DamagedCheckpoint(f"{folder} is not whole: it lacks {MANIFEST}")
    if path.stat().st_size == 0:
        raise DamagedCheckpoint(f"{path} is damaged: it is empty")
    try:
        entries = [(str(name), size, digest) for name, (size, digest) in json.loads(path.read_bytes())["files"].items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path} is damaged: {error!r}") from error
    if only is not None and only not in [name for name, _, _ in entries]:
        raise DamagedCheckpoint(f"{path} is damaged: it does not name {only}")
    for name, size, digest in entries:
        if only in (None, name):
            _check(folder / name, size, digest)


def _check(path: Path, size: Any, digest: Any) -> None:
    if not path.is_file():
        raise DamagedCheckpoint(f"{path} is missing")
    found = path.stat().st_size
    if found != size:
        raise DamagedCheckpoint(f"{path} is {'truncated' if found < size else 'changed'}: {found} of {size} bytes")
    if digest is not None and _sha256(path) != digest:
        raise DamagedCheckpoint(f"{path} is changed: its SHA-256 is not that of {MANIFEST}")


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
