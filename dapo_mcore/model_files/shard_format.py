"""The format of a folder of shards: tensors cut into slices, which lie in safetensors files of several writers.

Change here: what the index says of a slice. Nothing imports torch: the process that writes a checkpoint beside training
(checkpoint/saver.py) needs little memory and starts fast.

    shards/rank_00007.safetensors   slices, one after the other. One process writes it
    shards/index.json               of each tensor its dtype, its whole shape and its slices; of each slice its place and checksums

A slice has a CRC-32 for every 4 MiB, so a reader can check the bytes that it needs without reading the rest.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dapo_mcore.errors import DamagedCheckpoint

SHARDS = "shards"
INDEX = "index.json"
FORMAT = 1
CHUNK = 4 << 20
"""Bytes that a checksum covers."""


class Slice(NamedTuple):
    """The block of a tensor at `offsets` with `sizes`: row-major bytes of a file from `start` on, with their checksums."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    checksums: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor with its dtype, by its name in safetensors, and its whole shape."""

    dtype: str
    shape: tuple[int, ...]
    slices: list[Slice] = field(default_factory=list)


class StoredFile(NamedTuple):
    """A file's size, and the size and checksum of its header."""

    num_bytes: int
    header_bytes: int
    header_checksum: int


@dataclass(frozen=True)
class ShardIndex:
    """The content of index.json: tensors by key, and files by name."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    files: dict[str, StoredFile] = field(default_factory=dict)

    def add(self, other: ShardIndex) -> None:
        """Add another writer's slices. Raise DamagedCheckpoint if both do not mean the same tensors."""
        self.files.update(other.files)
        for key, theirs in other.tensors.items():
            ours = self.tensors.setdefault(key, StoredTensor(theirs.dtype, theirs.shape))
            if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
                raise DamagedCheckpoint(
                    f"{key} is {ours.dtype} {list(ours.shape)} in one shard and {theirs.dtype} {list(theirs.shape)} in another"
                )
            ours.slices.extend(theirs.slices)

    def check_covered(self, where: Path) -> None:
        """Raise DamagedCheckpoint for a tensor with a hole, or with elements twice."""
        for key, tensor in self.tensors.items():
            stored, wanted = sum(math.prod(part.sizes) for part in tensor.slices), math.prod(tensor.shape)
            if stored != wanted:
                raise DamagedCheckpoint(f"{where} is incomplete: {key} has {stored} of {wanted} elements")

    def to_json(self) -> bytes:
        numbers = {name: number for number, name in enumerate(self.files)}
        tensors = {
            key: [
                *(tensor.dtype, tensor.shape),
                [[s.offsets, s.sizes, numbers[s.file], s.start, s.checksums] for s in tensor.slices],
            ]
            for key, tensor in self.tensors.items()
        }
        content = {"format": FORMAT, "checksum": "crc32", "chunk": CHUNK, "files": self.files, "tensors": tensors}
        return json.dumps(content, separators=(",", ":")).encode()


def parse_index(content: bytes, where: Path) -> ShardIndex:
    """Return the index in a JSON text. Raise DamagedCheckpoint, with the path `where`, if it is none."""
    try:
        told = json.loads(content)
        if (told["format"], told["checksum"], told["chunk"]) != (FORMAT, "crc32", CHUNK):
            raise ValueError(f"format {told['format']} with {told['checksum']}, this version reads {FORMAT} with crc32")
        files = {name: StoredFile(*map(int, entry)) for name, entry in told["files"].items()}
        return ShardIndex({key: _tensor(entry, list(files)) for key, entry in told["tensors"].items()}, files)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{where} is damaged: {error!r}") from error


def chunks(data: memoryview) -> Iterator[memoryview]:
    """Yield the pieces of a slice's bytes that have a checksum each."""
    return (data[start : start + CHUNK] for start in range(0, len(data), CHUNK))


def checksums(data: memoryview) -> list[int]:
    return [zlib.crc32(chunk) for chunk in chunks(data)]


def merged(parts: Iterable[ShardIndex]) -> ShardIndex:
    whole = ShardIndex()
    for part in parts:
        whole.add(part)
    return whole


def _tensor(entry: Sequence[Any], files: Sequence[str]) -> StoredTensor:
    dtype, shape, slices = entry
    found = [
        Slice(tuple(offsets), tuple(sizes), files[number], int(start), tuple(sums))
        for offsets, sizes, number, start, sums in slices
    ]
    if any(not len(shape) == len(part.offsets) == len(part.sizes) for part in found):
        raise ValueError(f"a slice of a tensor {shape} has another number of dims")
    return StoredTensor(str(dtype), tuple(shape), found)
