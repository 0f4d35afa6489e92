"""Hugging Face model folders: reading tensors slice by slice, and writing a folder that transformers loads.

Writing goes to a temporary folder that is renamed when whole, so a model folder is never half written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dapo_mcore.config import ModelConfig
from dapo_mcore.errors import CheckpointError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


class SafetensorsReader:
    """Tensors of a folder with model.safetensors, or shards with model.safetensors.index.json. Reads only what is asked.

    Raises CheckpointError for a missing or truncated file and for a tensor that no file holds.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.file_of = self._index()
        self._open: dict[str, Any] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> torch.Tensor:
        """The tensor, or its slice [start, stop) along `dim`, in host memory and stored dtype."""
        if dim is None:
            return self._slice(name)[:]
        return self._slice(name)[(slice(None),) * dim + (slice(start, stop),)]

    def _index(self) -> dict[str, str]:
        index, single = self.folder / "model.safetensors.index.json", self.folder / "model.safetensors"
        if index.is_file():
            return _read_weight_map(index)
        if single.is_file():
            return dict.fromkeys(self._handle(single.name, {}).keys(), single.name)
        raise CheckpointError(
            f"{self.folder} holds neither model.safetensors nor model.safetensors.index.json; "
            f"give a folder with weights, or set model.init random"
        )

    def _slice(self, name: str) -> Any:
        if name not in self.file_of:
            raise CheckpointError(f"{self.folder} has no tensor {name}; it does not fit its config.json")
        handle = self._handle(self.file_of[name], self._open)
        try:
            return handle.get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(f"the index names {name} in {self.file_of[name]}, which lacks it: {error}") from error

    def _handle(self, file: str, cache: dict[str, Any]) -> Any:
        if file not in cache:
            path = self.folder / file
            if not path.is_file():
                raise CheckpointError(f"{path} is missing, but the index names it; fetch the whole folder again")
            try:
                cache[file] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise CheckpointError(f"{path} is truncated or broken: {error}; fetch it again") from error
        return cache[file]


def _read_weight_map(index: Path) -> dict[str, str]:
    """File name by tensor name."""
    try:
        return dict(json.loads(index.read_bytes())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is broken: {error!r}; fetch it again") from error


class RandomReader:
    """Weights drawn by transformers' own initialisation from a seed: the same on every rank and in every layout."""

    def __init__(self, hf_config: Any, seed: int):
        from transformers import AutoModelForCausalLM

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.state = AutoModelForCausalLM.from_config(hf_config).float().state_dict()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.state[name].shape)

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> torch.Tensor:
        tensor = self.state[name]
        return tensor if dim is None else tensor.narrow(dim, start, stop - start)


def open_weights(model: ModelConfig, hf_config: Any, seed: int) -> SafetensorsReader | RandomReader:
    """The reader of the starting weights that the model section asks for."""
    return RandomReader(hf_config, seed) if model.init == "random" else SafetensorsReader(model.path)


def save_hf_folder(
    weights: Iterator[tuple[str, torch.Tensor]],
    folder: Path,
    *,
    hf_config: Any,
    source: str | Path,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes config, tokenizer files and sharded safetensors; rank 0 only. Replaces an existing folder when whole."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    hf_config.save_pretrained(partial)
    for name in TOKENIZER_FILES:
        if (file := Path(source) / name).is_file():
            shutil.copyfile(file, partial / name)
    _write_shards(weights, partial, shard_bytes)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def _write_shards(weights: Iterator[tuple[str, torch.Tensor]], folder: Path, shard_bytes: int) -> None:
    shards: list[list[str]] = []
    total = 0
    for number, shard in enumerate(_shards(weights, shard_bytes)):
        save_file(shard, folder / f"shard-{number}.safetensors", metadata={"format": "pt"})
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(shards) == 1:
        os.replace(folder / "shard-0.safetensors", folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / f"shard-{number}.safetensors", folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _shards(weights: Iterator[tuple[str, torch.Tensor]], shard_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in weights:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.detach().cpu().contiguous().clone()
        size += tensor.nbytes
    yield shard
