"""HF folder → Megatron checkpoint → HF folder, tensor by tensor: no process group, no model, about one tensor of memory.

Change here: what an output folder holds and in which files. How a conversion is written, resumed and shown is in job.py.

    hf-to-mcore   OUT/config.json, tokenizer files, megatron/ (a distributed checkpoint that any layout loads)
    mcore-to-hf   OUT/config.json, tokenizer files, model*.safetensors (+ index), as transformers writes them
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dapo_mcore.architecture.mapping import (
    Parameter,
    checkpoint_slice,
    import_parameter,
    import_rows,
    local_shape,
    parameters,
    row_ranges,
)
from dapo_mcore.architecture.reader import read_architecture
from dapo_mcore.architecture.shape import WeightShape, weight_shape
from dapo_mcore.architecture.weight_rules import EMBEDDING
from dapo_mcore.config.model import ModelConfig
from dapo_mcore.convert.job import Job, OutputFile, Report
from dapo_mcore.errors import CheckpointError, ConfigError
from dapo_mcore.model_files.hf_config import load_hf_config
from dapo_mcore.model_files.hf_folder import (
    INDEX,
    SHARD_BYTES,
    SafetensorsReader,
    open_stored,
    plan_files,
    tensor_groups,
    write_index,
)
from dapo_mcore.model_files.megatron_folder import MEGATRON, MegatronReader, is_megatron_folder
from dapo_mcore.model_files.nearby import check_model_folder
from dapo_mcore.model_files.safetensors_file import SafetensorsWriter
from dapo_mcore.model_files.side_files import copy_model_files
from dapo_mcore.model_files.torch_dist import StoredChunk, without_crc, write_chunk, write_metadata

Reader = SafetensorsReader | MegatronReader


@dataclass(frozen=True)
class Cut:
    """The layout for which a checkpoint is cut into chunks. It loads in any other, too; in this one, each rank reads only its own
    bytes."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    expert_parallel: int = 1
    expert_tensor_parallel: int = 1


def open_model(folder: Path) -> tuple[Reader, WeightShape]:
    """Return the weights of a folder of either kind as HF tensors, and the sizes in its config.json.

    Raises ConfigError or CheckpointError, naming the key or tensor, for a folder that is not whole and consistent.
    """
    check_model_folder(folder)
    hf_config = load_hf_config(ModelConfig(path=str(folder)))
    read_architecture(hf_config, longest_sequence=0)  # what training would refuse is refused now
    shape = weight_shape(hf_config, 1)
    reader = open_stored(folder, hf_config)
    if isinstance(reader, SafetensorsReader):
        _check_one_dtype(reader, shape)
    return reader, shape


def num_bytes(reader: Reader, name: str) -> int:
    return torch.Size(reader.shape(name)).numel() * reader.dtype(name).itemsize


def _check_one_dtype(reader: SafetensorsReader, shape: WeightShape) -> None:
    """Raise CheckpointError if tensors differ in dtype: the stacked tensors of a checkpoint have one dtype."""
    common = reader.dtype(EMBEDDING.hf[0])
    for parameter in parameters(shape):
        allowed = {common, torch.float32} if parameter.rule.float32 else {common}
        for name in parameter.hf:
            if reader.dtype(name) not in allowed:
                raise CheckpointError(
                    f"{name} is {reader.dtype(name)}, {EMBEDDING.hf[0]} is {common}; all must be one of float32, "
                    f"bfloat16, float16"
                )


def hf_to_mcore(source: Path, out: Path, cut: Cut, report: Report) -> None:
    """Write the Megatron checkpoint of an HF folder. Bad input raises before anything is written."""
    if is_megatron_folder(source):
        raise CheckpointError(f"{source} is a Megatron checkpoint already; the other direction is mcore-to-hf")
    check_model_folder(source, "Hugging Face")
    reader, _ = open_model(source)
    shape = weight_shape(load_hf_config(ModelConfig(path=str(source))), cut.tensor_parallel)
    _check_cut(shape, cut)
    files = [
        OutputFile(f"{MEGATRON}/{name}", size, partial(_write_chunks, name, group, reader, shape, cut))
        for name, group, size in _checkpoint_files(reader, shape, cut)
    ]
    job = Job(out, files, inputs=[*reader.paths, source / "config.json"], options=[*map(str, vars(cut).items())])
    with without_crc(), job.run(report) as (folder, notes):
        copy_model_files(source, folder)
        chunks = [StoredChunk(*map(_tuple, entry)) for note in notes for entry in note]
        places = [(parameter, checkpoint_slice(parameter, shape)) for parameter in parameters(shape)]
        dtypes = {place.key: reader.dtype(parameter.hf[0]) for parameter, place in places}
        sizes = {place.key: (*place.size, *local_shape(parameter, shape)) for parameter, place in places}
        write_metadata(folder / MEGATRON, chunks, dtypes, sizes)


def mcore_to_hf(source: Path, out: Path, report: Report, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the HF folder of a Megatron checkpoint: one that hf_to_mcore made, or a training run's step folder."""
    check_model_folder(source, "Megatron")
    reader, shape = open_model(source)
    plan = plan_files(tensor_groups(shape, lambda parameter: reader.dtype(parameter.hf[0])), shard_bytes)
    files = [
        OutputFile(name, sum(info.nbytes for info in tensors.values()), partial(_write_tensors, tensors, reader))
        for name, tensors in plan.items()
    ]
    stored = [reader.store.description, *reader.store.paths, source / "config.json"]
    job = Job(out, files, inputs=stored, options=[str(shard_bytes)])
    with job.run(report) as (folder, _):
        copy_model_files(source, folder)
        (folder / INDEX).unlink(missing_ok=True)
        write_index(folder, plan)


def _check_cut(shape: WeightShape, cut: Cut) -> None:
    """Raise ConfigError if the layout does not fit the model."""
    if shape.num_heads % cut.tensor_parallel:
        usable = ", ".join(str(n) for n in range(1, shape.num_heads + 1) if shape.num_heads % n == 0)
        raise ConfigError(
            f"--tensor-parallel {cut.tensor_parallel} does not divide num_attention_heads {shape.num_heads}; use one of {usable}"
        )
    if cut.pipeline_parallel > shape.num_layers:
        raise ConfigError(f"--pipeline-parallel {cut.pipeline_parallel} exceeds num_hidden_layers {shape.num_layers}")
    for option, size in (("expert", cut.expert_parallel), ("expert-tensor", cut.expert_tensor_parallel)):
        if size > 1 and not shape.num_experts:
            raise ConfigError(
                f"--{option}-parallel {size} is of no use: {shape.architecture} has no experts; leave it out"
            )
    if shape.num_experts % cut.expert_parallel:
        raise ConfigError(
            f"--expert-parallel {cut.expert_parallel} does not divide the number of experts, {shape.num_experts}"
        )
    for parameter in parameters(shape):
        local_shape(parameter, shape, _ranks(parameter, cut))


def _ranks(parameter: Parameter, cut: Cut) -> int:
    return cut.expert_tensor_parallel if parameter.rule.per_expert else cut.tensor_parallel


def _checkpoint_files(reader: Reader, shape: WeightShape, cut: Cut) -> Iterator[tuple[str, list[Parameter], int]]:
    """Yield (name, parameters, bytes) of every chunk file: one per layer, and per expert rank for layers with experts."""
    groups: dict[tuple[int, int], list[Parameter]] = {}
    for parameter in parameters(shape):
        last = parameter.layer < 0 and parameter.rule.mcore[0].startswith(("decoder.final", "output"))
        layer = shape.num_layers if last else parameter.layer
        expert = parameter.expert * cut.expert_parallel // shape.num_experts if parameter.rule.per_expert else 0
        groups.setdefault((layer, expert), []).append(parameter)
    for number, ((layer, expert), group) in enumerate(groups.items()):
        stage = min(max(layer, 0), shape.num_layers - 1) * cut.pipeline_parallel // shape.num_layers
        size = sum(math.prod(local_shape(p, shape)) * reader.dtype(p.hf[0]).itemsize for p in group)
        yield f"__{stage * cut.expert_parallel + expert}_{number}.distcp", group, size


def _write_chunks(
    name: str, group: list[Parameter], reader: Reader, shape: WeightShape, cut: Cut, path: Path, report: Report
) -> list[list[Any]]:
    """Write one file of the checkpoint, and return where each chunk is."""
    stored = []
    with open(path, "wb") as file:
        for parameter in group:
            place = checkpoint_slice(parameter, shape)
            for offsets, block in _blocks(parameter, reader, shape, _ranks(parameter, cut)):
                offsets, sizes = (*place.offset, *offsets), (*[1] * len(place.offset), *block.shape)
                stored.append(list(write_chunk(file, name, place.key, offsets, sizes, block)))
                report.advance(block.nbytes)
    return stored


def _blocks(
    parameter: Parameter, reader: Reader, shape: WeightShape, num_ranks: int
) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """Yield (offsets within the parameter, tensor) of each rank's part. A tensor that is cut by columns is read once."""
    rest = (0,) * (len(local_shape(parameter, shape)) - 1)
    if parameter.rule.tp_split == "rows":
        ranges = [rows for rank in range(num_ranks) for rows in row_ranges(parameter, shape, rank, num_ranks)]
        for start, stop in ranges:
            yield (start, *rest), import_rows(parameter, reader, shape, start, stop)
        return
    whole = import_parameter(parameter, reader, shape)
    for number, block in enumerate(whole.chunk(num_ranks, dim=1) if parameter.rule.tp_split else [whole]):
        yield (0, *(number * block.shape[-1] for _ in rest)), block


def _write_tensors(tensors: dict[str, Any], reader: Reader, path: Path, report: Report) -> None:
    """Write one safetensors file."""
    writer = SafetensorsWriter(path, tensors)
    for name in tensors:
        tensor = reader.read(name)
        writer.write(name, tensor)
        report.advance(tensor.nbytes)
    writer.close()


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
