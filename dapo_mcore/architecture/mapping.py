"""Between Hugging Face tensors and Megatron parameters: names, merges and shards. No collectives, no files.

Change here: how tensors are merged and split. Which parameters a model has comes from families.py.

A Megatron parameter is one or more HF tensors merged (`linear_qkv` from q, k and v), then split over tensor-parallel ranks.
`HFRows` describe both: the runs of HF rows that make up a rank's rows, in order. Loading reads these runs, export writes
them back. A split may go through a query group, as in Megatron when there are more ranks than KV heads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dapo_mcore.architecture.shape import WeightShape
from dapo_mcore.architecture.weight_rules import EMBEDDING, FINAL_NORM, OUTPUT, TIED_OUTPUT, WeightRule
from dapo_mcore.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Parameter:
    """One Megatron parameter of the whole model: a weight rule with its layer and expert number (-1 if it has none)."""

    rule: WeightRule
    layer: int = -1
    expert: int = -1

    @property
    def names(self) -> tuple[str, ...]:
        """Return Megatron's names: with the local layers, then, if it differs, with Transformer Engine's layers."""
        return tuple(name.format(layer=self.layer, expert=self.expert) for name in self.rule.mcore)

    @property
    def hf(self) -> tuple[str, ...]:
        """Return the names of the HF tensors, in merge order."""
        return tuple(name.format(layer=self.layer, expert=self.expert) for name in self.rule.hf)


class HFRows(NamedTuple):
    """Rows start … stop - 1 of a parameter's HF tensor number `source`."""

    source: int
    start: int
    stop: int


class CheckpointSlice(NamedTuple):
    """Where a checkpoint keeps a parameter: tensor `key`, at index `offset` of its leading layer and expert dims.

    size  sizes of those dims; it and `offset` are () if there are none
    """

    key: str
    offset: tuple[int, ...]
    size: tuple[int, ...]


class WeightReader(Protocol):
    """Access to HF tensors by name and slice. model_files reads them from files; tests pass a dictionary."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """Return the tensor, or its slice [start, stop) along `dim`."""
        ...


def parameters(shape: WeightShape) -> Iterator[Parameter]:
    """Yield every parameter of the model once, in the order of execution. Leaves out a tied output layer."""
    yield Parameter(EMBEDDING)
    for layer in range(shape.num_layers):
        for rule in layer_rules(shape, layer):
            for expert in range(shape.num_experts) if rule.per_expert else (-1,):
                yield Parameter(rule, layer, expert)
    yield Parameter(FINAL_NORM)
    if not shape.tied:
        yield Parameter(OUTPUT)


def find_parameter(name: str, shape: WeightShape) -> Parameter:
    """Return the parameter for a Megatron name with global layer and expert numbers. Raises CheckpointError if there is none."""
    layer = int(match.group(1)) if (match := re.match(r"decoder\.layers\.(\d+)\.", name)) else -1
    expert = int(match.group(1)) if (match := re.search(r"(?:local_experts\.|\.weight)(\d+)", name)) else -1
    known = layer < shape.num_layers and expert < shape.num_experts
    outside_layers = (EMBEDDING, TIED_OUTPUT if shape.tied else OUTPUT, FINAL_NORM)
    for rule in () if not known else outside_layers if layer < 0 else layer_rules(shape, layer):
        if name in (found := Parameter(rule, layer, expert)).names:
            return found
    raise CheckpointError(
        f"{shape.architecture} has no weight rule for the Megatron parameter {name}; add it in architecture/weight_rules.py"
    )


def hf_shapes(parameter: Parameter, shape: WeightShape) -> list[tuple[int, ...]]:
    """Return the shape that the config implies for each HF tensor of the parameter."""
    return [tuple(shape.size(size) for size in sizes) for sizes in parameter.rule.sizes]


def local_shape(parameter: Parameter, shape: WeightShape, num_ranks: int = 1) -> tuple[int, ...]:
    """Return the parameter's shape on each of `num_ranks` tensor-parallel ranks, with a padded vocabulary.

    Raises ConfigError if the split is not even.
    """
    rule, whole = parameter.rule, _merged_shape(parameter, shape)
    if rule.tp_split is None:
        return whole
    dim = 1 if rule.tp_split == "columns" else 0
    # gate and up are split separately
    unit = whole[dim] // len(rule.hf) if rule.merge == "gate_up" else whole[dim]
    if unit % num_ranks:
        raise ConfigError(
            f"tensor parallel {num_ranks} does not divide the {unit} {rule.tp_split} of {parameter.names[0]} "
            f"({' × '.join(map(str, whole))}); use a divisor of {unit}"
        )
    return (*whole[:dim], whole[dim] // num_ranks, *whole[dim + 1 :])


def row_ranges(parameter: Parameter, shape: WeightShape, rank: int, num_ranks: int) -> list[tuple[int, int]]:
    """Return the rows [start, stop) of the merged parameter that a tensor-parallel rank holds, in order, with padding.

    For a parameter that is split by rows: one range, or for gate_up one of gate and one of up.
    """
    size = local_shape(parameter, shape, num_ranks)[0]
    if parameter.rule.merge != "gate_up":
        return [(rank * size, (rank + 1) * size)]
    half = size // 2
    return [(start, start + half) for start in (rank * half, (num_ranks + rank) * half)]


def import_parameter(
    parameter: Parameter, reader: WeightReader, shape: WeightShape, rank: int = 0, num_ranks: int = 1
) -> Tensor:
    """Return the shard of tensor-parallel rank `rank` of `num_ranks`. Reads only its slices of the HF tensors.

    For an expert's parameter, `rank` and `num_ranks` are those of the expert-tensor-parallel group. Raises CheckpointError if
    an HF tensor's shape does not match the config.
    """
    check_shapes(parameter, reader, shape)
    split, wanted = parameter.rule.tp_split, local_shape(parameter, shape, num_ranks)
    if split is None or (num_ranks == 1 and split == "columns"):
        return reader.read(parameter.hf[0])
    if split == "columns":
        return reader.read(parameter.hf[0], 1, rank * wanted[1], (rank + 1) * wanted[1])
    return _join(
        [import_rows(parameter, reader, shape, *rows) for rows in row_ranges(parameter, shape, rank, num_ranks)]
    )


def import_rows(parameter: Parameter, reader: WeightReader, shape: WeightShape, start: int, stop: int) -> Tensor:
    """Return rows start … stop - 1 of the merged parameter. Vocabulary rows that are only padding are zero."""
    runs = _between(_all_rows(parameter, shape), start, stop)
    parts = [reader.read(parameter.hf[run.source], 0, run.start, run.stop) for run in runs]
    if missing := stop - start - sum(len(part) for part in parts):
        like = parts[0] if parts else reader.read(parameter.hf[0], 0, 0, 0)
        parts.append(like.new_zeros(missing, *like.shape[1:]))
    return _join(parts)


def export_parameter(parameter: Parameter, shards: Sequence[Tensor], shape: WeightShape) -> list[tuple[str, Tensor]]:
    """Return a parameter's (HF name, whole tensor) pairs. `shards` has one per tensor-parallel rank, in rank order.

    Leaves out vocabulary padding. A tensor may share memory with a shard.
    """
    rule, names = parameter.rule, parameter.hf
    if rule.tp_split is None:
        return [(names[0], shards[0])]
    if rule.tp_split == "columns":
        return [(names[0], _join(shards, dim=1))]
    parts: list[list[Tensor]] = [[] for _ in names]
    for rank, shard in enumerate(shards):
        ranges = row_ranges(parameter, shape, rank, len(shards))
        runs = [run for rows in ranges for run in _between(_all_rows(parameter, shape), *rows)]
        sizes = [run.stop - run.start for run in runs]
        for run, part in zip(runs, shard[: sum(sizes)].split(sizes) if runs else (), strict=True):
            parts[run.source].append(part)
    return [(name, _join(own)) for name, own in zip(names, parts, strict=True)]


def merged_rows(parameter: Parameter, source: int, start: int, stop: int, shape: WeightShape) -> list[tuple[int, int]]:
    """Return the ranges of merged rows, in order, that hold rows start … stop - 1 of HF tensor number `source`."""
    found, position = [], 0
    for run in _all_rows(parameter, shape):
        low, high = max(start, run.start), min(stop, run.stop)
        if run.source == source and low < high:
            found.append((position + low - run.start, position + high - run.start))
        position += run.stop - run.start
    return found


def checkpoint_slice(parameter: Parameter, shape: WeightShape) -> CheckpointSlice:
    """Return where a distributed checkpoint keeps the parameter. Layers that are not alike are not stacked.

    Source: sharded_state_dict of GPTModel, TransformerBlock, SequentialMLP and TEGroupedMLP (megatron-core 0.16.1).
    """
    rule = parameter.rule
    key, dims = rule.key or rule.mcore[-1], []
    if rule.per_layer:
        stacked = shape.layers_are_alike
        key = key.replace("{layer}.", "").replace(".layers.", f".layers.{'' if stacked else f'{parameter.layer}.'}", 1)
        dims += [(parameter.layer, shape.num_layers)] if stacked else []
    if rule.per_expert:
        dims.append((parameter.expert, shape.num_experts))
    return CheckpointSlice(key, tuple(index for index, _ in dims), tuple(size for _, size in dims))


def layer_rules(shape: WeightShape, layer: int) -> list[WeightRule]:
    """Return the weight rules of the parameters that a layer has. Layers with equal `moe_layers` entries have the same."""
    family = shape.family
    rules = family.attention + (family.moe if shape.moe_layers[layer] else family.dense)
    return [rule for rule in rules if all(shape.size(size) for sizes in rule.sizes for size in sizes)]


def _merged_shape(parameter: Parameter, shape: WeightShape) -> tuple[int, ...]:
    """Return the parameter's shape before it is split, with a padded vocabulary."""
    shapes = hf_shapes(parameter, shape)
    rows = shape.padded_vocab_size if parameter.rule.is_vocab else sum(own[0] for own in shapes)
    return (rows, *shapes[0][1:])


def _all_rows(parameter: Parameter, shape: WeightShape) -> list[HFRows]:
    """Return the HF rows that make up the merged parameter, in order. Vocabulary padding at the end is not among them."""
    rows = [own[0] for own in hf_shapes(parameter, shape)]
    if parameter.rule.merge == "qkv":
        return _query_groups(rows, shape)
    return [HFRows(source, 0, count) for source, count in enumerate(rows)]


def _query_groups(rows: list[int], shape: WeightShape) -> list[HFRows]:
    """Return all rows of linear_qkv: for each key-value head its queries, its key, its value."""
    groups = shape.num_kv_heads
    return [
        HFRows(source, group * count // groups, (group + 1) * count // groups)
        for group in range(groups)
        for source, count in enumerate(rows)
    ]


def _between(runs: list[HFRows], start: int, stop: int) -> list[HFRows]:
    """Return rows start … stop - 1 of the concatenated runs."""
    found, position = [], 0
    for run in runs:
        low, high = max(start - position, 0), min(stop - position, run.stop - run.start)
        if low < high:
            found.append(HFRows(run.source, run.start + low, run.start + high))
        position += run.stop - run.start
    return found


def check_shapes(parameter: Parameter, reader: WeightReader, shape: WeightShape) -> None:
    """Raise CheckpointError if an HF tensor's shape does not match the config."""
    for name, expected in zip(parameter.hf, hf_shapes(parameter, shape), strict=True):
        if (found := tuple(reader.shape(name))) != expected:
            raise CheckpointError(f"{name} is {list(found)}, but config.json implies {list(expected)}: they disagree")


def _join(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)
