"""One safetensors file: tensors read by slice, and written one at a time.

Change here: how bytes are read and written. The safetensors package maps whole files into memory and writes only from a full
dictionary; here a tensor is read into its own memory, a file may be larger than memory, and a truncated file is recognised
by its header. The format: eight bytes of header length, a JSON header, the tensors' bytes without gaps
(github.com/huggingface/safetensors, README, "Format").
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dapo_mcore.errors import CheckpointError
from dapo_mcore.model_files.config_json import without_repeats
from dapo_mcore.model_files.disk import sync_to_disk

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors package, too."""


class TensorInfo(NamedTuple):
    """A tensor's entry in the header. `start` counts bytes from the beginning of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """A file that is open for reading: `tensors` by name, in the file's order. Only tensors that are read take memory.

    Raises CheckpointError for a missing, truncated or broken file, before anything is allocated.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; fetch the whole folder again")
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (held while the reader lives)
        self._size = path.stat().st_size
        self._data = 0
        try:
            self.tensors = self._read_header()
        except BaseException:
            self.close()
            raise

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """Return the tensor, or its slice [start, stop) along `dim`, in its own memory. A slice of rows reads only its bytes."""
        info = self.tensors[name]
        if dim is None:
            return self._read(info, 0, info.shape)
        if dim != 0:
            return self._read(info, 0, info.shape).narrow(dim, start, stop - start).clone()
        rows = range(*slice(start, stop).indices(info.shape[0]))
        row_bytes = math.prod(info.shape[1:]) * info.dtype.itemsize
        return self._read(info, rows.start * row_bytes, (len(rows), *info.shape[1:]))

    def close(self) -> None:
        self._file.close()

    def _read(self, info: TensorInfo, offset: int, shape: tuple[int, ...]) -> Tensor:
        raw = torch.empty(math.prod(shape) * info.dtype.itemsize, dtype=torch.uint8)
        left, position = memoryview(raw.numpy()), self._data + info.start + offset
        # one system call reads at most 2 GiB; reading at a position lets threads share the file
        while left:
            if not (count := os.preadv(self._file.fileno(), [left], position)):
                raise CheckpointError(f"{self.path} ended while it was read; another process may have changed it")
            left, position = left[count:], position + count
        return raw.view(info.dtype).view(shape)

    def _read_header(self) -> dict[str, TensorInfo]:
        length = int.from_bytes(self._file.read(8), "little")
        if self._size < 8 or length > min(self._size - 8, MAX_HEADER):
            raise CheckpointError(
                f"{self.path} is truncated: its header does not fit into {self._size} bytes; fetch it again"
            )
        try:
            header = json.loads(self._file.read(length), object_pairs_hook=without_repeats)
            header.pop("__metadata__", None)
            tensors = {name: _parse(name, entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.path} has a broken header: {error!r}; fetch it again") from error
        self._data = 8 + length
        for name, info in tensors.items():
            if (end := self._data + info.start + info.nbytes) > self._size:
                raise CheckpointError(
                    f"{self.path} is truncated: {name} ends at byte {end}, but the file has {self._size}; fetch it again"
                )
        self._check_overlap(tensors)
        held, named = self._size - self._data, sum(info.nbytes for info in tensors.values())
        if held != named:
            raise CheckpointError(f"{self.path} has {held} bytes of data, but its tensors {named}; fetch it again")
        return tensors

    def _check_overlap(self, tensors: Mapping[str, TensorInfo]) -> None:
        """Raise CheckpointError for two tensors that share bytes."""
        ordered = sorted((info.start, info.start + info.nbytes, name) for name, info in tensors.items() if info.nbytes)
        for (_, end, before), (start, _, name) in pairwise(ordered):
            if start < end:
                raise CheckpointError(
                    f"{self.path} has a broken header: {name} begins at byte {start}, but {before} ends at byte {end}; "
                    f"fetch it again"
                )


class SafetensorsWriter:
    """A new file whose tensors are announced by dtype and shape. Each is then written once, in any order.

    Wider types come first in the file, so that every tensor is aligned. `close` raises CheckpointError when a tensor is
    still missing.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo]):
        self.path = path
        self._left = _place(tensors)
        header = {"__metadata__": {"format": "pt"}} | {name: _entry(info) for name, info in self._left.items()}
        text = json.dumps(header, separators=(",", ":")).encode()
        # spaces up to a multiple of eight keep the data aligned
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by close)
        _write(self._file, memoryview(len(text).to_bytes(8, "little") + text))

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor. It must have the announced dtype and shape."""
        info = self._left.pop(name)
        assert (tensor.dtype, tuple(tensor.shape)) == info[:2], (name, tensor.dtype, tensor.shape, info)
        raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        self._file.seek(self._data + info.start)
        # not numpy(), after which torch refuses to resize a storage, and so to offload a parameter (actor/memory.py)
        _write(self._file, memoryview((ctypes.c_ubyte * raw.numel()).from_address(raw.data_ptr())).cast("B"))

    def close(self) -> None:
        """Close the file and wait until it is on disk. Raise CheckpointError if a tensor was not written."""
        self._file.close()
        if self._left:
            raise CheckpointError(
                f"{self.path} lacks {len(self._left)} of its tensors: {', '.join(list(self._left)[:3])} …"
            )
        sync_to_disk(self.path)


def _parse(name: str, entry: dict) -> TensorInfo:
    start, stop = entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} has dtype {entry['dtype']}; known are {', '.join(DTYPES)}")
    info = TensorInfo(DTYPES[entry["dtype"]], tuple(entry["shape"]), start)
    if any(size < 0 for size in info.shape):
        raise ValueError(f"{name} has the shape {list(info.shape)}")
    if start < 0 or stop - start != info.nbytes:
        raise ValueError(f"{name} {list(info.shape)} needs {info.nbytes} bytes, but has {stop - start}")
    return info


def _entry(info: TensorInfo) -> dict:
    offsets = [info.start, info.start + info.nbytes]
    return {"dtype": NAMES[info.dtype], "shape": list(info.shape), "data_offsets": offsets}


def _place(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return the same tensors with their starts."""
    placed, position = {}, 0
    for name, info in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        placed[name] = info._replace(start=position)
        position += info.nbytes
    return placed


def _write(file, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]
