"""Reads a folder of shards (shard_format.py): any region of any tensor, and only the bytes that it needs.

Change here: how bytes are read and checked. Every chunk's checksum is checked before its bytes are used.
"""

from __future__ import annotations

import math
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dapo_mcore.errors import CheckpointError, DamagedCheckpoint
from dapo_mcore.model_files.safetensors_file import DTYPES
from dapo_mcore.model_files.shard_format import CHUNK, INDEX, ShardIndex, Slice, StoredTensor, chunks, parse_index

_STAGING = 16 * CHUNK
"""Bytes read at a time, and bytes that the system reads ahead meanwhile."""
_MOST_AHEAD = 16
"""Reads ahead: each holds a file open."""
_THREADS = 2
"""Threads that check bytes: a checksum takes as long as reading and copying together."""

Region = list[tuple[int, int]]
"""[start, stop) along each dim."""
Wanted = tuple[str, Sequence[int], Tensor]
"""The name of a tensor, where a block of it begins along each dim, and the memory of the block."""


class _Read(NamedTuple):
    """Elements of a slice that are read at once, and the part of a block that they fill.

    file           open for reading
    chunks         numbers of the chunks to read, [first, stop)
    start, stop    their bytes in the file
    strides, first the target's elements among those read
    """

    key: str
    part: Slice
    target: Tensor
    file: BinaryIO
    chunks: tuple[int, int]
    start: int
    stop: int
    strides: list[int]
    first: int


class ShardReader:
    """A folder of shards that is open for reading, from any thread.

    Raise DamagedCheckpoint for a damaged index, and for missing or truncated files. Files are checked by their size here, and by
    checksums as they are read.

    check_first   checks a file's path and size, instead of check_size, and only before the file's first use: one of many ranks
                  need not look at all files
    """

    def __init__(self, folder: Path, check_first: Callable[[Path, int], None] | None = None):
        self.folder = folder
        path = folder / INDEX
        if not path.is_file():
            raise DamagedCheckpoint(f"{path} is missing")
        self._index: ShardIndex = parse_index(path.read_bytes(), path)
        self.tensors: dict[str, StoredTensor] = self._index.tensors
        self._index.check_covered(path)
        self._checked: set[str] = set()
        self._corners: dict[str, np.ndarray] = {}
        self._check_first = check_first
        if check_first is None:
            for name, file in self._index.files.items():
                check_size(folder / name, file.num_bytes)

    @property
    def description(self) -> Path:
        """Return the file that says where each tensor lies."""
        return self.folder / INDEX

    @property
    def paths(self) -> list[Path]:
        """Return the files of tensors."""
        return [self.folder / name for name in self._index.files]

    def num_parts(self, key: str) -> int:
        """Return the number of slices in which the tensor lies."""
        return len(self._tensor(key).slices)

    def dtype(self, key: str) -> torch.dtype:
        name = self._tensor(key).dtype
        if name not in DTYPES:
            raise DamagedCheckpoint(f"{self.folder / INDEX} is damaged: {key} has the dtype {name}")
        return DTYPES[name]

    def size(self, key: str) -> tuple[int, ...]:
        return self._tensor(key).shape

    def read(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Return the block of tensor `key` at `offsets` with `sizes`, in its own memory."""
        block = torch.empty(list(sizes), dtype=self.dtype(key))
        self.fill([(key, offsets, block)])
        return block

    def fill(self, wanted: Iterable[Wanted]) -> None:
        """Fill blocks, one after the other. Takes at most 64 MiB and a row of host memory. The system reads the next 64 MiB while bytes
        are checked and copied."""
        staging = _Staging()
        with ThreadPoolExecutor(_THREADS) as pool:
            for read in _announced(read for block in wanted for read in self._reads(*block)):
                view = staging.of(read.stop - read.start)
                with read.file:
                    _fill(view, read.file, read.start)
                _check(read, view, pool)
                flat = torch.frombuffer(view, dtype=self.dtype(read.key))
                read.target.copy_(flat.as_strided(read.target.shape, read.strides, read.first))

    def _tensor(self, key: str) -> StoredTensor:
        if key not in self.tensors:
            raise CheckpointError(f"{self.folder} has no tensor {key}; it does not fit its config.json")
        return self.tensors[key]

    def _touched(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[Slice]:
        """Yield the slices that overlap the block. A tensor of many layers and experts has thousands."""
        slices = self.tensors[key].slices
        if key not in self._corners:
            first = np.array([part.offsets for part in slices]).reshape(len(slices), -1)
            self._corners[key] = np.stack(
                [first, first + np.array([part.sizes for part in slices]).reshape(first.shape)]
            )
        first, last = self._corners[key]
        low, high = np.array(offsets), np.array(offsets) + np.array(sizes)
        touched = (np.maximum(first, low) < np.minimum(last, high)).all(axis=1)
        return (slices[number] for number in np.flatnonzero(touched))

    def _reads(self, key: str, offsets: Sequence[int], block: Tensor) -> Iterator[_Read]:
        """Yield the reads that fill a block, each with its file open."""
        itemsize = self.dtype(key).itemsize
        if not block.numel():
            return
        for part in self._touched(key, offsets, block.shape):
            strides = [math.prod(part.sizes[dim + 1 :]) for dim in range(len(part.sizes))]
            region = [
                (max(0, at - start), min(count, at + size - start))
                for at, size, start, count in zip(offsets, block.shape, part.offsets, part.sizes, strict=True)
            ]
            for band in _bands(part.sizes, region, itemsize):
                target = block
                for dim, ((low, high), start, at) in enumerate(zip(band, part.offsets, offsets, strict=True)):
                    target = target.narrow(dim, start + low - at, high - low)
                yield self._read(key, part, band, strides, target)

    def _read(self, key: str, part: Slice, band: Region, strides: list[int], target: Tensor) -> _Read:
        """Return the read of a region of a slice: the chunks that hold its elements."""
        itemsize, num_bytes = self.dtype(key).itemsize, self._num_bytes(key, part)
        first = sum(low * stride for (low, _), stride in zip(band, strides, strict=True))
        last = sum((high - 1) * stride for (_, high), stride in zip(band, strides, strict=True))
        numbers = first * itemsize // CHUNK, -(-(last + 1) * itemsize // CHUNK)
        start, stop = numbers[0] * CHUNK, min(numbers[1] * CHUNK, num_bytes)
        self._check_file(part.file)
        # opened each time: a large checkpoint has more files than a process may hold open
        file = open(self.folder / part.file, "rb", buffering=0)  # noqa: SIM115 (closed by fill)
        return _Read(
            key, part, target, file, numbers, part.start + start, part.start + stop, strides, first - start // itemsize
        )

    def _num_bytes(self, key: str, part: Slice) -> int:
        num_bytes = math.prod(part.sizes) * self.dtype(key).itemsize
        if len(part.checksums) != -(-num_bytes // CHUNK):
            raise DamagedCheckpoint(f"{self.folder / INDEX} is damaged: {key} has {len(part.checksums)} checksums")
        return num_bytes

    def _check_file(self, name: str) -> None:
        """Check a file's header, and its size if that is not done, before the first use."""
        if name in self._checked:
            return
        path, told = self.folder / name, self._index.files[name]
        if self._check_first is not None:
            self._check_first(path, told.num_bytes)
        with open(path, "rb") as file:
            header = file.read(told.header_bytes)
        if zlib.crc32(header) != told.header_checksum:
            raise DamagedCheckpoint(f"{path} is changed: the checksum of its header does not hold")
        self._checked.add(name)


class _Staging:
    """Memory for one read at a time. It is used again: fresh memory costs several times as much as filling it."""

    def __init__(self) -> None:
        self._memory = bytearray()

    def of(self, num_bytes: int) -> memoryview:
        if len(self._memory) < num_bytes:
            self._memory = bytearray(num_bytes)
        return memoryview(self._memory)[:num_bytes]


def _announced(reads: Iterator[_Read]) -> Iterator[_Read]:
    """Yield the reads in order. Tell the system of each one _STAGING bytes ahead, so that it reads while others are checked."""
    ahead: deque[_Read] = deque()
    try:
        for read in reads:
            os.posix_fadvise(read.file.fileno(), read.start, read.stop - read.start, os.POSIX_FADV_WILLNEED)
            ahead.append(read)
            while len(ahead) > _MOST_AHEAD or sum(own.stop - own.start for own in list(ahead)[1:]) >= _STAGING:
                yield ahead.popleft()
        while ahead:
            yield ahead.popleft()
    finally:
        for read in ahead:
            read.file.close()


def _check(read: _Read, data: memoryview, pool: ThreadPoolExecutor) -> None:
    """Raise DamagedCheckpoint for the first chunk whose checksum does not hold."""
    wanted = read.part.checksums[slice(*read.chunks)]
    found = (map if len(wanted) == 1 else pool.map)(zlib.crc32, chunks(data))  # a single one is not worth a thread
    for number, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        if ours != theirs:
            raise DamagedCheckpoint(
                f"{read.file.name} is changed: the checksum of {read.key} at {list(read.part.offsets)} does not hold at byte "
                f"{read.start + number * CHUNK}"
            )


def check_size(path: Path, num_bytes: int) -> None:
    """Raise DamagedCheckpoint if the file is missing or has another size."""
    found = path.stat().st_size if path.is_file() else -1
    if found != num_bytes:
        problem = "is missing" if found < 0 else "is truncated" if found < num_bytes else "is changed"
        raise DamagedCheckpoint(f"{path} {problem}: it has {max(found, 0)} of {num_bytes} bytes")


def _fill(view: memoryview, file: BinaryIO, position: int) -> None:
    """Read into all of `view`. One system call reads at most 2 GiB."""
    while view:
        if not (count := os.preadv(file.fileno(), [view], position)):
            raise DamagedCheckpoint(f"{file.name} is truncated: it ends before its byte {position + len(view)}")
        view, position = view[count:], position + count


def _bands(sizes: Sequence[int], region: Region, itemsize: int) -> Iterator[Region]:
    """Yield parts of a region of a row-major block whose bytes lie close together: at most 64 MiB from first to last."""
    dim = next((dim for dim, (low, high) in enumerate(region) if high - low > 1), len(region) - 1)
    row = math.prod(sizes[dim + 1 :]) * itemsize
    low, high = region[dim]
    step = max(1, _STAGING // row)
    for start in range(low, high, step):
        band = [*region[:dim], (start, min(high, start + step)), *region[dim + 1 :]]
        if row > _STAGING and dim + 1 < len(region):
            yield from _bands(sizes, band, itemsize)
        else:
            yield band
