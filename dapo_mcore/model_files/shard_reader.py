"""Reads a folder of shards (shard_format.py): any region of any tensor, and only the bytes that it needs.

Change here: how bytes are read and checked. Every chunk's checksum is checked before its bytes are used.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from dapo_mcore.errors import CheckpointError, DamagedCheckpoint
from dapo_mcore.model_files.safetensors_file import DTYPES
from dapo_mcore.model_files.shard_format import CHUNK, INDEX, ShardIndex, Slice, StoredTensor, parse_index

_STAGING = 16 * CHUNK
"""Bytes read at a time."""

Region = list[tuple[int, int]]
"""[start, stop) along each dim."""


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
        self.read_into(key, offsets, block)
        return block

    def read_into(self, key: str, offsets: Sequence[int], block: Tensor) -> None:
        """Fill `block` with the part of tensor `key` that begins at `offsets`. Takes at most 64 MiB and a row of host memory."""
        tensor, dtype = self._tensor(key), self.dtype(key)
        if not block.numel():
            return
        for part in self._touched(key, offsets, block.shape):
            region = [
                (max(0, at - start), min(count, at + size - start))
                for at, size, start, count in zip(offsets, block.shape, part.offsets, part.sizes, strict=True)
            ]
            for band in _bands(part.sizes, region, dtype.itemsize):
                target = block
                for dim, ((low, high), start, at) in enumerate(zip(band, part.offsets, offsets, strict=True)):
                    target = target.narrow(dim, start + low - at, high - low)
                target.copy_(self._band(key, tensor, part, band, dtype))

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

    def _band(self, key: str, tensor: StoredTensor, part: Slice, band: Region, dtype: torch.dtype) -> Tensor:
        """Return the elements of a region of a slice, as a view of freshly read bytes."""
        strides = [math.prod(part.sizes[dim + 1 :]) for dim in range(len(part.sizes))]
        first = sum(low * stride for (low, _), stride in zip(band, strides, strict=True))
        last = sum((high - 1) * stride for (_, high), stride in zip(band, strides, strict=True))
        start, data = self._read(key, part, first * dtype.itemsize, (last + 1) * dtype.itemsize)
        flat = torch.frombuffer(data, dtype=dtype)
        return flat.as_strided([high - low for low, high in band], strides, first - start // dtype.itemsize)

    def _read(self, key: str, part: Slice, start: int, stop: int) -> tuple[int, bytearray]:
        """Return the chunks that hold bytes [start, stop) of a slice, and the place of the first one."""
        first, last = start // CHUNK, -(-stop // CHUNK)
        size = min(last * CHUNK, self._num_bytes(key, part)) - first * CHUNK
        data, path = bytearray(size), self.folder / part.file
        view = memoryview(data)
        self._check_file(part.file)
        # opened each time: a large checkpoint has more files than a process may hold open
        with open(path, "rb", buffering=0) as file:
            _fill(view, file, part.start + first * CHUNK)
        for number, at in enumerate(range(0, size, CHUNK), start=first):
            if zlib.crc32(view[at : at + CHUNK]) != part.checksums[number]:
                raise DamagedCheckpoint(
                    f"{path} is changed: the checksum of {key} at {list(part.offsets)} does not hold at byte "
                    f"{part.start + number * CHUNK}"
                )
        return first * CHUNK, data

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
