"""Writes one rank's shard of a checkpoint, and what an index has to say of it.

Change here: how bytes reach the disk. Nothing imports torch (see saver.py).

    shards/rank_00007.safetensors   the rank's slices
           rank_00007.json          their part of the index. It is there once the slices are on disk
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dapo_mcore.model_files.disk import sync_to_disk
from dapo_mcore.model_files.shard_format import (
    CHUNK,
    ShardIndex,
    Slice,
    StoredFile,
    StoredTensor,
    checksums,
    merged,
    parse_index,
)

PIECE = 16 * CHUNK
"""Bytes that are copied, hashed and sent to the disk at a time. A piece is hashed while it is written."""


class PlannedSlice(NamedTuple):
    """A slice that is to be written: a part of tensor `key`, of `num_bytes` bytes from byte `start` of the file on."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    num_bytes: int


def write_shard(
    folder: Path,
    rank: int,
    header: bytes,
    slices: list[PlannedSlice],
    pieces: Callable[[PlannedSlice], Iterator[memoryview]],
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write a rank's slices and its part of the index, and wait until both are on disk.

    pieces   the bytes of a slice in order, at most PIECE at a time, and all but the last of PIECE bytes
    check    called before each piece; an exception ends the writing
    A rank without slices writes no safetensors file. Raise OSError where the disk does not take it.
    """
    name, index = f"rank_{rank:05d}", ShardIndex()
    if slices:
        file_name = f"{name}.safetensors"
        with (
            ThreadPoolExecutor(max_workers=2) as pool,
            open(folder / file_name, "wb", buffering=0) as file,
            _Flusher(file, pool) as flusher,
        ):
            flusher.write(memoryview(header))
            for planned in slices:
                found = []
                for piece in pieces(planned):
                    check()
                    sums = pool.submit(checksums, piece)
                    flusher.write(piece)
                    found += sums.result()
                stored = index.tensors.setdefault(planned.key, StoredTensor(planned.dtype, planned.shape))
                stored.slices.append(Slice(planned.offsets, planned.sizes, file_name, planned.start, tuple(found)))
        size = slices[-1].start + slices[-1].num_bytes
        index.files[file_name] = StoredFile(size, len(header), zlib.crc32(header))
    _write_at_once(folder / f"{name}.json", index.to_json())


def part_path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.json"


def read_parts(folder: Path, num_ranks: int) -> ShardIndex:
    """Return the index of all ranks' parts. Raise DamagedCheckpoint if together they do not hold every element once."""
    paths = [part_path(folder, rank) for rank in range(num_ranks)]
    index = merged(parse_index(path.read_bytes(), path) for path in paths)
    index.check_covered(folder)
    return index


class _Flusher:
    """Writes, and sends what is written to the disk beside the next writes: dirty pages never exceed two pieces."""

    def __init__(self, file: BinaryIO, pool: ThreadPoolExecutor):
        self._file, self._pool = file, pool
        self._flush: Future[None] | None = None
        self._dirty = 0

    def write(self, data: memoryview) -> None:
        while data:
            written = self._file.write(data)
            data, self._dirty = data[written:], self._dirty + written
        if self._dirty >= PIECE:
            self._wait()
            self._flush, self._dirty = self._pool.submit(self._to_disk), 0

    def __enter__(self) -> _Flusher:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._wait()
        if kind is None:
            os.fsync(self._file.fileno())

    def _wait(self) -> None:
        if self._flush is not None:
            self._flush.result()

    def _to_disk(self) -> None:
        os.fdatasync(self._file.fileno())
        # pages that nobody reads soon would push out those of others
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _write_at_once(path: Path, content: bytes) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(content)
    sync_to_disk(new)
    os.replace(new, path)
