"""Hugging Face model folders: reading tensors slice by slice, and writing a folder that transformers loads.

Change here: which files a folder has, and how tensors are spread over them. Writing goes to a temporary folder that is
renamed when whole, so a model folder is never half written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dapo_mcore.architecture.mapping import Parameter, hf_shapes, parameters
from dapo_mcore.architecture.shape import WeightShape, weight_shape
from dapo_mcore.architecture.tensor_check import check_tensors, check_tied
from dapo_mcore.config.model import ModelConfig
from dapo_mcore.errors import CheckpointError
from dapo_mcore.model_files.megatron_folder import MegatronReader, is_megatron_folder
from dapo_mcore.model_files.model_folder import INDEX, SINGLE, model_folder
from dapo_mcore.model_files.safetensors_file import SafetensorsFile, SafetensorsWriter, TensorInfo
from dapo_mcore.model_files.side_files import write_model_files, write_stop_tokens

EXPORT = ".dapo_mcore.json"
"""A file in every exported folder, from the start: it says that we wrote the folder, and what its weights have been trained for."""
SHARD_BYTES = 5_000_000_000

Files = dict[str, dict[str, TensorInfo]]
"""The tensors of each file."""


class SafetensorsReader:
    """Tensors of a folder with model.safetensors, or shards with model.safetensors.index.json. Reads only what is asked.

    Raises CheckpointError for a missing or truncated file, and where index and files disagree.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._file_of: dict[str, SafetensorsFile] = {}
        self.index = self._read_index()
        for path in self.paths:
            file = SafetensorsFile(path)
            self._file_of |= dict.fromkeys(file.tensors, file)
        self._check_index()

    @property
    def paths(self) -> list[Path]:
        """Return the files that hold the tensors."""
        return [self.folder / file for file in sorted(set(self.index.values()))] or [self.folder / SINGLE]

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    def info(self, name: str) -> TensorInfo:
        if name not in self._file_of:
            raise CheckpointError(f"{self.folder} has no tensor {name}; it does not fit its config.json")
        return self._file_of[name].tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self.info(name).dtype

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> torch.Tensor:
        """Return the tensor, or its slice [start, stop) along `dim`, in host memory and in the stored dtype."""
        self.info(name)
        return self._file_of[name].read(name, dim, start, stop)

    def _read_index(self) -> dict[str, str]:
        """File name by tensor name; empty for a folder with a single file."""
        index = self.folder / INDEX
        if index.is_file():
            if (self.folder / SINGLE).is_file():
                raise CheckpointError(
                    f"{self.folder} holds both {SINGLE} and {INDEX}; one is a leftover of another model: remove it"
                )
            try:
                weight_map = json.loads(index.read_bytes())["weight_map"]
                if not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
                    raise ValueError("weight_map must give a file for each tensor")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index} is broken: {error!r}; fetch it again") from error
            return weight_map
        if (self.folder / SINGLE).is_file():
            return {}
        raise CheckpointError(
            f"{self.folder} holds neither {SINGLE} nor {INDEX}; give a folder with weights, or set model.init random"
        )

    def _check_index(self) -> None:
        for name, file in self.index.items():
            if name not in self._file_of or self._file_of[name].path.name != file:
                raise CheckpointError(f"{self.folder / INDEX} names {name} in {file}, which lacks it; fetch both again")


class RandomReader:
    """Weights from transformers' own initialisation with a seed: the same on every rank and in every layout."""

    def __init__(self, hf_config: Any, seed: int):
        from transformers import AutoModelForCausalLM

        from dapo_mcore.architecture.hf_views import hf_views

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(hf_config).float()
        self.state = hf_views(model)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.state[name].shape)

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> torch.Tensor:
        tensor = self.state[name]
        return tensor if dim is None else tensor.narrow(dim, start, stop - start)


def open_weights(model: ModelConfig, hf_config: Any, seed: int) -> SafetensorsReader | MegatronReader | RandomReader:
    """Return a reader of the starting weights that the section `model` asks for. Raise CheckpointError as open_stored does."""
    return (
        RandomReader(hf_config, seed)
        if model.init == "random"
        else open_stored(model_folder(model, weights=True), hf_config)
    )


def open_stored(folder: Path, hf_config: Any) -> SafetensorsReader | MegatronReader:
    """Return a reader of a model folder whose tensors fit the config: a Hugging Face folder, or one that convert.py made.

    Raise CheckpointError with file and tensor for tensors that are missing, unexpected, of another shape, or quantized.
    Only headers are read (and the output head of a model that ties it, where one is stored).
    """
    shape = weight_shape(hf_config, 1)
    if is_megatron_folder(folder):
        return MegatronReader(folder, shape)
    reader = SafetensorsReader(folder)
    check_tensors(reader, shape, num_mtp_layers=getattr(hf_config, "num_nextn_predict_layers", 0))
    check_tied(reader, shape)
    return reader


def plan_files(groups: Iterable[Mapping[str, TensorInfo]], shard_bytes: int = SHARD_BYTES) -> Files:
    """Return the tensors of each file, at most `shard_bytes` per file. A group stays together, even if it is larger alone."""
    shards: list[dict[str, TensorInfo]] = [{}]
    for group in groups:
        filled, size = (sum(info.nbytes for info in part.values()) for part in (shards[-1], group))
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
        shards[-1].update(group)
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def tensor_groups(shape: WeightShape, dtype_of: Callable[[Parameter], torch.dtype]) -> Iterator[dict[str, TensorInfo]]:
    """Yield the HF tensors of each parameter, in order."""
    for parameter in parameters(shape):
        sizes = zip(parameter.hf, hf_shapes(parameter, shape), strict=True)
        yield {name: TensorInfo(dtype_of(parameter), size) for name, size in sizes}


def write_index(folder: Path, files: Files) -> None:
    """Write the index if there are several files."""
    if len(files) == 1:
        return
    total = sum(info.nbytes for tensors in files.values() for info in tensors.values())
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def save_hf_folder(
    weights: Iterator[tuple[str, torch.Tensor]],
    folder: Path,
    *,
    shape: WeightShape,
    dtype: torch.dtype,
    hf_config: Any,
    source: str | Path,
    step: int,
    num_epochs: int | None = None,
    stop_token_ids: Sequence[int] = (),
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model folder on rank 0: config.json, the other files of `source` (side_files.py) and sharded safetensors.

    step        rollout steps done, for `exported_step`.
    num_epochs  epochs done, for `exported_epochs`; None if they are not whole or not counted.
    stop_token_ids  where generation stops, in place of what `source` says; empty: as it says.

    An earlier export is replaced once the new one is whole. Each tensor is written as it comes, so memory is that of one
    tensor. Raise CheckpointError as check_replaceable does.
    """
    check_replaceable(folder)
    partial = _partial(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / EXPORT).write_text(json.dumps({"step": step, "num_epochs": num_epochs}), encoding="utf-8")
    write_model_files(partial, hf_config, dtype, Path(source))
    if stop_token_ids:
        write_stop_tokens(partial, stop_token_ids)
    groups = tensor_groups(shape, lambda parameter: torch.float32 if parameter.rule.float32 else dtype)
    files = plan_files(groups, shard_bytes)
    writers = {file: SafetensorsWriter(partial / file, tensors) for file, tensors in files.items()}
    file_of = {name: file for file, tensors in files.items() for name in tensors}
    for name, tensor in weights:
        writers[file_of[name]].write(name, tensor)
    for writer in writers.values():
        writer.close()
    write_index(partial, files)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def check_replaceable(folder: Path) -> None:
    """Raise CheckpointError if an export to `folder` would delete something that no export has written."""
    for path in (folder, _partial(folder)):
        if os.path.lexists(path) and not (path / EXPORT).is_file() and not _is_empty(path):
            raise CheckpointError(
                f"{path} is where the model is exported to, but no export has made it ({EXPORT} is missing); move it away"
            )


def exported_step(folder: Path) -> int | None:
    """Return the rollout step of an exported folder's weights, or None if it is unknown."""
    return _exported(folder, "step")


def exported_epochs(folder: Path) -> int | None:
    """Return the epochs that an exported folder's weights have been trained for, or None if they are unknown or not whole."""
    return _exported(folder, "num_epochs")


def _exported(folder: Path, key: str) -> int | None:
    try:
        return json.loads((folder / EXPORT).read_bytes())[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())
