"""A Megatron checkpoint, read as Hugging Face tensors: one that convert.py made, or one of a training run.

Change here: what such a folder is. architecture/mapping.py has the names; shard_reader.py reads the bytes of a training run's
checkpoint, torch_dist.py those of a conversion and of training runs before format 3.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dapo_mcore.architecture.mapping import Parameter, checkpoint_slice, hf_shapes, merged_rows, parameters
from dapo_mcore.architecture.shape import WeightShape
from dapo_mcore.errors import CheckpointError
from dapo_mcore.model_files.manifest import check_manifest
from dapo_mcore.model_files.shard_format import INDEX, SHARDS
from dapo_mcore.model_files.shard_reader import ShardReader
from dapo_mcore.model_files.torch_dist import DistributedReader, is_checkpoint

MEGATRON = "megatron"
"""The subfolder with the checkpoint itself; config.json and the tokenizer are beside it. A training run's is SHARDS."""

Store = DistributedReader | ShardReader


def is_megatron_folder(folder: Path) -> bool:
    return has_shards(folder) or is_checkpoint(folder / MEGATRON)


def has_shards(folder: Path) -> bool:
    """Return True for a training run's checkpoint of format 3 or later, whole or damaged."""
    return (folder / SHARDS).is_dir()


def open_store(folder: Path, check_first: Callable[[Path, int], None] | None = None) -> Store:
    """Return a reader of the tensors in a checkpoint's folder; `check_first` as in ShardReader. Raise CheckpointError as the reader
    does, and for an index that is not the manifest's: the checksums in it cover bytes, not their places."""
    if not has_shards(folder):
        return DistributedReader(folder / MEGATRON)
    check_manifest(folder, only=f"{SHARDS}/{INDEX}")
    return ShardReader(folder / SHARDS, check_first)


class MegatronReader:
    """The checkpoint's weights by HF name and slice, whatever layout saved it. Reads only the chunks that it needs.

    Raises CheckpointError where a tensor is missing or has not the shape that the config implies.
    """

    def __init__(self, folder: Path, shape: WeightShape):
        self.folder = folder
        self.store = open_store(folder)
        self._shape = shape
        self._of = {name: (parameter, i) for parameter in parameters(shape) for i, name in enumerate(parameter.hf)}
        for parameter in parameters(shape):
            self._check(parameter)

    @property
    def names(self) -> list[str]:
        return list(self._of)

    def shape(self, name: str) -> tuple[int, ...]:
        parameter, source = self._find(name)
        return hf_shapes(parameter, self._shape)[source]

    def dtype(self, name: str) -> torch.dtype:
        return self.store.dtype(checkpoint_slice(self._find(name)[0], self._shape).key)

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """Return the tensor, or its slice [start, stop) along `dim`. Do not write into it: tensors may share memory."""
        parameter, source = self._find(name)
        region = [(start, stop) if axis == dim else (0, size) for axis, size in enumerate(self.shape(name))]
        ranges = merged_rows(parameter, source, *region[0], self._shape)
        parts = [self._block(parameter, [rows, *region[1:]]) for rows in ranges or [(0, 0)]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _find(self, name: str) -> tuple[Parameter, int]:
        if name not in self._of:
            raise CheckpointError(f"{self.folder} has no tensor {name}; it does not fit its config.json")
        return self._of[name]

    def _block(self, parameter: Parameter, region: list[tuple[int, int]]) -> Tensor:
        """Return a block of the merged parameter, [start, stop) along each of its dims."""
        key, offset, _ = checkpoint_slice(parameter, self._shape)
        starts, sizes = [start for start, _ in region], [stop - start for start, stop in region]
        return self.store.read(key, [*offset, *starts], [*[1] * len(offset), *sizes]).reshape(sizes)

    def _check(self, parameter: Parameter) -> None:
        key, _, size = checkpoint_slice(parameter, self._shape)
        shapes = hf_shapes(parameter, self._shape)
        rows, stored = sum(own[0] for own in shapes), self.store.size(key)
        wanted = (*size, rows, *shapes[0][1:])
        padded = parameter.rule.is_vocab and len(stored) == 2 and stored[0] >= rows and stored[1:] == wanted[1:]
        if stored != wanted and not padded:
            raise CheckpointError(
                f"{self.store.folder}: {key} is {list(stored)}, but config.json implies {list(wanted)}: they disagree"
            )
