"""Megatron's distributed checkpoints (`torch_dist`), read and written outside of a process group, tensor by tensor.

Change here: only what upstream changes in the format. Reading: any region of any tensor, loading only the chunks
that it touches. Writing: chunk by chunk, so that memory is that of one chunk; megatron-core's own saving takes all at once.
The format is torch.distributed.checkpoint's (torch 2.11-2.13): `*.distcp` files of torch.save'd chunks, `.metadata` with
the place of each, and megatron-core's `metadata.json` and `common.pt` (dist_checkpointing 0.16.1).
"""

from __future__ import annotations

import io
import json
import math
import pickle
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import local
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from dapo_mcore.errors import CheckpointError, DamagedCheckpoint
from dapo_mcore.model_files.disk import sync_to_disk
from dapo_mcore.model_files.shard_reader import Wanted

FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}

_UNREADABLE = (
    RuntimeError, pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, LookupError, ArithmeticError,
    AssertionError, ImportError, MemoryError,
)  # fmt: skip
"""Errors that unpickling a damaged file may raise."""


class StoredChunk(NamedTuple):
    """A block of the tensor `key` at `offsets` with `sizes`, as bytes start … start + length - 1 of a file."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


class DistributedReader:
    """A checkpoint that is open for reading, from any thread. Each thread keeps its last chunk, because neighbouring
    regions are read one after the other.

    Raise CheckpointError for a folder that is not such a checkpoint, and for missing or truncated files.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        metadata = _load_metadata(folder / ".metadata")
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: tensor
            for key, tensor in metadata.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata)
        }
        self._places: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        self._chunks: dict[str, dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}
        self._last = local()
        self._check_files()

    def dtype(self, key: str) -> torch.dtype:
        return self._tensor(key).properties.dtype

    def size(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensor(key).size)

    def read(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Return the block of tensor `key` at `offsets` with `sizes`. Do not write into it: later results may share its memory."""
        whole = torch.empty(0)
        if key not in self._chunks:
            self._chunks[key] = _by_layer_and_expert(key, self._tensor(key))
        for chunk in self._chunks[key].get(tuple(offsets[:-2]), ()):
            region = _overlap(chunk, offsets, sizes)
            if region is None:
                continue
            stored = self._chunk(MetadataIndex(key, chunk.offsets))
            part = _narrow(stored, [low - at for (low, _), at in zip(region, chunk.offsets)], _lengths(region))
            if list(part.shape) == list(sizes):
                return part
            if not whole.numel():
                whole = stored.new_empty(list(sizes))
            _narrow(whole, [low - at for (low, _), at in zip(region, offsets)], _lengths(region)).copy_(part)
        return whole if whole.numel() else torch.empty(list(sizes), dtype=self.dtype(key))

    def fill(self, wanted: Iterable[Wanted]) -> None:
        """Fill blocks, one after the other, as ShardReader does."""
        for key, offsets, block in wanted:
            block.copy_(self.read(key, offsets, block.shape))

    @property
    def description(self) -> Path:
        """Return the file that says where each tensor lies."""
        return self.folder / ".metadata"

    @property
    def paths(self) -> list[Path]:
        """Return the files of tensors."""
        return sorted(self.folder.glob("*.distcp"))

    def num_parts(self, key: str) -> int:
        """Return the number of chunks in which the tensor lies."""
        return len(self._tensor(key).chunks)

    def _tensor(self, key: str) -> TensorStorageMetadata:
        if key not in self.tensors:
            raise CheckpointError(f"{self.folder} has no tensor {key}; it does not fit its config.json")
        return self.tensors[key]

    def _chunk(self, index: MetadataIndex) -> Tensor:
        if getattr(self._last, "index", None) != index:
            self._last.index = self._last.tensor = None  # its memory is free before the next one is read
            self._last.tensor = self._load(index)
            self._last.index = index
        return self._last.tensor

    def _load(self, index: MetadataIndex) -> Tensor:
        place, path = self._places[index], self.folder / self._places[index].relative_path
        try:
            with open(path, "rb") as file:
                view = _create_file_view(file, place.offset, place.length)
                tensor = torch.load(view, map_location="cpu", weights_only=True)
        except _UNREADABLE as error:
            raise DamagedCheckpoint(
                f"{path} is damaged: {index.fqn} at byte {place.offset}: {_reason(error)}"
            ) from error
        near = self._chunks[index.fqn][tuple(index.offset[:-2])]
        told = next(chunk.sizes for chunk in near if chunk.offsets == index.offset)
        if not isinstance(tensor, Tensor) or (tensor.dtype, tensor.shape) != (self.dtype(index.fqn), told):
            raise DamagedCheckpoint(f"{path} is damaged: {index.fqn} at byte {place.offset} is not what .metadata says")
        return tensor

    def _check_files(self) -> None:
        sizes: dict[str, int] = {}
        for index, place in self._places.items():
            path = self.folder / place.relative_path
            if place.relative_path not in sizes:
                sizes[place.relative_path] = path.stat().st_size if path.is_file() else -1
            if sizes[place.relative_path] < place.offset + place.length:
                problem = "is missing" if sizes[place.relative_path] < 0 else "is truncated"
                raise DamagedCheckpoint(f"{path} {problem}: {index.fqn} ends at its byte {place.offset + place.length}")
        for key, tensor in self.tensors.items():
            if not all(MetadataIndex(key, chunk.offsets) in self._places for chunk in tensor.chunks):
                raise DamagedCheckpoint(f"{self.folder / '.metadata'} does not say where all of {key} lies")


def write_chunk(
    file: BinaryIO, name: str, key: str, offsets: Sequence[int], sizes: Sequence[int], block: Tensor
) -> StoredChunk:
    """Append one chunk to the open file called `name`; `block` has the chunk's elements, `sizes` its shape."""
    start = file.tell()
    block = block.detach().contiguous()
    # a view would drag its whole storage along
    if block.untyped_storage().nbytes() != block.nbytes:
        block = block.clone()
    try:
        torch.save(block.view(list(sizes)), file)
    except RuntimeError as error:
        # torch's writer covers what the disk said
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    return StoredChunk(key, tuple(offsets), tuple(sizes), name, start, file.tell() - start)


@contextmanager
def without_crc() -> Iterator[None]:
    """Turn off torch.save's checksums: torch.load does not check them, and they halve the speed."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def write_metadata(
    folder: Path, chunks: Iterable[StoredChunk], dtypes: dict[str, torch.dtype], sizes: dict[str, tuple]
) -> None:
    """Turn a folder of chunk files into a checkpoint, and wait until it is on disk. `sizes` are the tensors' global shapes."""
    # pickle tells equal strings from one string: interned, the same chunks always give the same bytes
    tensors = {
        sys.intern(key): TensorStorageMetadata(TensorProperties(dtype=dtypes[key]), torch.Size(size), [])
        for key, size in sizes.items()
    }
    places = {}
    for chunk in chunks:
        key, file = sys.intern(chunk.key), sys.intern(chunk.file)
        block = ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
        tensors[key].chunks.append(block)
        places[MetadataIndex(key, block.offsets)] = _StorageInfo(file, chunk.start, chunk.length)
    metadata = Metadata(tensors, storage_data=places, storage_meta=StorageMeta())
    _write_bytes(folder / ".metadata", pickle.dumps(metadata))
    _write_bytes(folder / "metadata.json", json.dumps(FORMAT).encode())
    torch.save({}, common := io.BytesIO())
    _write_bytes(folder / "common.pt", common.getvalue())


def read_companions(folder: Path) -> dict[str, Any]:
    """Return what common.pt holds, as plain values. Raises CheckpointError for a damaged common.pt or metadata.json.

    Like `.metadata`, it is unpickled without running anything that it names.
    """
    path = folder / "metadata.json"
    try:
        told = json.loads(path.read_bytes())
        if not isinstance(told, dict) or told.get("sharded_backend") != FORMAT["sharded_backend"]:
            raise ValueError(f"it does not say sharded_backend {FORMAT['sharded_backend']}")
        path = folder / "common.pt"
        common = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise DamagedCheckpoint(f"{path} is truncated or damaged: {_reason(error)}") from error
    return common if isinstance(common, dict) else {}


def is_checkpoint(folder: Path) -> bool:
    return (folder / ".metadata").is_file() and (folder / "metadata.json").is_file()


_DTYPES = tuple(str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype))
_RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    # megatron-core stores the plans of its save, too
    "torch.distributed.checkpoint.planner": (
        "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
    ),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", *_DTYPES),
    "collections": ("OrderedDict",),
}  # fmt: skip
"""The classes that a `.metadata` file contains."""


class _MetadataUnpickler(pickle.Unpickler):
    """An unpickler that builds only the records of a `.metadata` file, because a pickle may come from anybody."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _RECORDS.get(module, ()):
            raise pickle.UnpicklingError(f"it wants {module}.{name}, which no checkpoint metadata needs")
        return super().find_class(module, name)


def _load_metadata(path: Path) -> Metadata:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} is no distributed checkpoint: it lacks .metadata")
    try:
        with open(path, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except _UNREADABLE as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error}") from error
    if not isinstance(metadata, Metadata) or not metadata.storage_data:
        raise DamagedCheckpoint(f"{path} cannot be read: it holds no checkpoint metadata")
    return metadata


def _by_layer_and_expert(key: str, tensor: TensorStorageMetadata) -> dict[tuple[int, ...], list[ChunkStorageMetadata]]:
    """Return the chunks by their offsets in all dims but the last two: Megatron stores one layer and one expert per chunk.

    A tensor of many experts has thousands of chunks, of which a block touches a few.
    """
    stored, wanted = sum(math.prod(chunk.sizes) for chunk in tensor.chunks), math.prod(tensor.size)
    if stored != wanted or any(size != 1 for chunk in tensor.chunks for size in chunk.sizes[:-2]):
        raise CheckpointError(
            f"{key} {list(tensor.size)} is stored as {len(tensor.chunks)} chunks of {stored} elements in all, not as "
            f"{wanted} in chunks of one layer and expert each; megatron-core wrote no such checkpoint"
        )
    found: dict[tuple[int, ...], list[ChunkStorageMetadata]] = {}
    for chunk in tensor.chunks:
        found.setdefault(tuple(chunk.offsets[:-2]), []).append(chunk)
    return found


def _overlap(chunk: ChunkStorageMetadata, offsets: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int]] | None:
    """Return the region that chunk and block share, [low, high) along each dim of the whole tensor; None if they share none."""
    region = [
        (max(at, start), min(at + count, start + size))
        for at, count, start, size in zip(chunk.offsets, chunk.sizes, offsets, sizes, strict=True)
    ]
    return region if all(low < high for low, high in region) else None


def _reason(error: Exception) -> str:
    """Return the error in one line. Torch's own text has many, and advises to run the file's code."""
    if isinstance(error, pickle.UnpicklingError):
        return "it is no pickle of plain values"
    return str(error).partition("\n")[0] or type(error).__name__


def _lengths(region: list[tuple[int, int]]) -> list[int]:
    return [high - low for low, high in region]


def _narrow(tensor: Tensor, starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    for dim, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    sync_to_disk(path)
