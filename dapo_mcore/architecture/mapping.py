"""Between Hugging Face tensors and Megatron parameters: names, merges and shards. No collectives, no files.

Change here: how tensors are merged and cut. Which parameters there are is the table's (families.py).

A Megatron parameter is one or more HF tensors merged (`linear_qkv` of q, k and v), then cut over tensor-parallel ranks.
Both are described at once by *pieces*: the runs of HF rows that a rank's rows consist of, in order. Loading reads the
pieces, export writes them back; TP may cut through a query group, as Megatron does beyond the number of KV heads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dapo_mcore.architecture.families import EMBEDDING, FINAL_NORM, OUTPUT, TIED_OUTPUT, Rule
from dapo_mcore.architecture.shape import WeightShape
from dapo_mcore.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Parameter:
    """One Megatron parameter of the whole model: its rule with the layer and expert filled in."""

    rule: Rule
    layer: int = -1
    expert: int = -1

    @property
    def names(self) -> tuple[str, ...]:
        """Megatron's names: with the local spec, and where it differs, with Transformer Engine's layers."""
        return tuple(name.format(layer=self.layer, expert=self.expert) for name in self.rule.mcore)

    @property
    def hf(self) -> tuple[str, ...]:
        return tuple(name.format(layer=self.layer, expert=self.expert) for name in self.rule.hf)


class Piece(NamedTuple):
    """Rows start … stop - 1 of HF tensor number `source` of a parameter."""

    source: int
    start: int
    stop: int


class Place(NamedTuple):
    """A tensor `key` of a checkpoint, and where in its leading axes: at `offset` of `size`; both () without such axes."""

    key: str
    offset: tuple[int, ...]
    size: tuple[int, ...]


class WeightReader(Protocol):
    """Access to HF tensors by name and slice: hf_io reads files, tests pass a dictionary."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """The tensor, or its slice [start, stop) along `dim`."""
        ...


def parameters(shape: WeightShape) -> Iterator[Parameter]:
    """Every parameter of the model once, in the order of execution; with tied embeddings without the output layer."""
    yield Parameter(EMBEDDING)
    for layer in range(shape.num_layers):
        for rule in _layer_rules(shape, layer):
            for expert in range(shape.num_experts) if rule.of_expert else (-1,):
                yield Parameter(rule, layer, expert)
    yield Parameter(FINAL_NORM)
    if not shape.tied:
        yield Parameter(OUTPUT)


def find_parameter(name: str, shape: WeightShape) -> Parameter:
    """The parameter of a Megatron name with global layer and expert numbers. Raises CheckpointError for a stranger."""
    layer = int(match.group(1)) if (match := re.match(r"decoder\.layers\.(\d+)\.", name)) else -1
    expert = int(match.group(1)) if (match := re.search(r"(?:local_experts\.|\.weight)(\d+)", name)) else -1
    known = layer < shape.num_layers and expert < shape.num_experts
    ends = (EMBEDDING, TIED_OUTPUT if shape.tied else OUTPUT, FINAL_NORM)
    for rule in () if not known else ends if layer < 0 else _layer_rules(shape, layer):
        if name in (found := Parameter(rule, layer, expert)).names:
            return found
    raise CheckpointError(
        f"{shape.architecture} has no rule for the Megatron parameter {name}; extend architecture/families.py"
    )


def hf_shapes(parameter: Parameter, shape: WeightShape) -> list[tuple[int, ...]]:
    """The shape of each HF tensor of the parameter, as the config implies it."""
    return [tuple(shape.size(size) for size in sizes) for sizes in parameter.rule.sizes]


def local_shape(parameter: Parameter, shape: WeightShape, num_ranks: int = 1) -> tuple[int, ...]:
    """The parameter's shape on each of `num_ranks` tensor-parallel ranks; vocabularies are padded.

    Raises ConfigError where the cut does not come out even.
    """
    rule, whole = parameter.rule, _merged_shape(parameter, shape)
    if rule.cut is None:
        return whole
    dim = 1 if rule.cut == "columns" else 0
    # the halves of gate_up are cut one by one
    unit = whole[dim] // len(rule.hf) if rule.merge == "gate_up" else whole[dim]
    if unit % num_ranks:
        raise ConfigError(
            f"tensor parallel {num_ranks} does not divide the {unit} {rule.cut} of {parameter.names[0]} "
            f"({' × '.join(map(str, whole))}); use a divisor of {unit}"
        )
    return (*whole[:dim], whole[dim] // num_ranks, *whole[dim + 1 :])


def row_ranges(parameter: Parameter, shape: WeightShape, rank: int, num_ranks: int) -> list[tuple[int, int]]:
    """The rows [start, stop) of the merged parameter that a tensor-parallel rank holds, in order; padding included.

    For a parameter that is cut by rows. One range, or for gate_up one of each half.
    """
    size = local_shape(parameter, shape, num_ranks)[0]
    if parameter.rule.merge != "gate_up":
        return [(rank * size, (rank + 1) * size)]
    half = size // 2
    return [(start, start + half) for start in (rank * half, (num_ranks + rank) * half)]


def import_parameter(
    parameter: Parameter, reader: WeightReader, shape: WeightShape, rank: int = 0, num_ranks: int = 1
) -> Tensor:
    """What tensor-parallel rank `rank` of `num_ranks` holds of the parameter, read slice by slice from HF tensors.

    (Of an expert's parameter: rank and size are those of the expert-tensor-parallel group.) Raises CheckpointError for
    an HF tensor that has not the shape which the config implies.
    """
    check_shapes(parameter, reader, shape)
    cut, wanted = parameter.rule.cut, local_shape(parameter, shape, num_ranks)
    if cut is None or (num_ranks == 1 and cut == "columns"):
        return reader.read(parameter.hf[0])
    if cut == "columns":
        return reader.read(parameter.hf[0], 1, rank * wanted[1], (rank + 1) * wanted[1])
    return _join(
        [import_rows(parameter, reader, shape, *rows) for rows in row_ranges(parameter, shape, rank, num_ranks)]
    )


def import_rows(parameter: Parameter, reader: WeightReader, shape: WeightShape, start: int, stop: int) -> Tensor:
    """Rows start … stop - 1 of the merged parameter; vocabulary rows that HF has not are zero."""
    pieces = _between(_whole(parameter, shape), start, stop)
    parts = [reader.read(parameter.hf[piece.source], 0, piece.start, piece.stop) for piece in pieces]
    if missing := stop - start - sum(len(part) for part in parts):
        like = parts[0] if parts else reader.read(parameter.hf[0], 0, 0, 0)
        parts.append(like.new_zeros(missing, *like.shape[1:]))
    return _join(parts)


def export_parameter(parameter: Parameter, shards: Sequence[Tensor], shape: WeightShape) -> list[tuple[str, Tensor]]:
    """The (HF name, whole tensor) pairs of a parameter, from what each tensor-parallel rank holds, in rank order.

    Vocabulary padding is left out. A tensor may share memory with a shard.
    """
    rule, names = parameter.rule, parameter.hf
    if rule.cut is None:
        return [(names[0], shards[0])]
    if rule.cut == "columns":
        return [(names[0], _join(shards, dim=1))]
    parts: list[list[Tensor]] = [[] for _ in names]
    for rank, shard in enumerate(shards):
        ranges = row_ranges(parameter, shape, rank, len(shards))
        pieces = [piece for rows in ranges for piece in _between(_whole(parameter, shape), *rows)]
        sizes = [piece.stop - piece.start for piece in pieces]
        for piece, part in zip(pieces, shard[: sum(sizes)].split(sizes) if pieces else (), strict=True):
            parts[piece.source].append(part)
    return [(name, _join(own)) for name, own in zip(names, parts, strict=True)]


def merged_rows(parameter: Parameter, source: int, start: int, stop: int, shape: WeightShape) -> list[tuple[int, int]]:
    """Where rows start … stop - 1 of HF tensor number `source` lie in the merged parameter: ranges, in order."""
    found, position = [], 0
    for piece in _whole(parameter, shape):
        low, high = max(start, piece.start), min(stop, piece.stop)
        if piece.source == source and low < high:
            found.append((position + low - piece.start, position + high - piece.start))
        position += piece.stop - piece.start
    return found


def checkpoint_place(parameter: Parameter, shape: WeightShape) -> Place:
    """Where a distributed checkpoint keeps the parameter (before its own dims: layer and expert axes).

    Source: sharded_state_dict of GPTModel, TransformerBlock, SequentialMLP and TEGroupedMLP (megatron-core 0.16.1); layers
    that are not alike are not stacked.
    """
    rule = parameter.rule
    key, axes = rule.key or rule.mcore[-1], []
    if rule.of_layer:
        stacked = shape.layers_are_alike
        key = key.replace("{layer}.", "").replace(".layers.", f".layers.{'' if stacked else f'{parameter.layer}.'}", 1)
        axes += [(parameter.layer, shape.num_layers)] if stacked else []
    if rule.of_expert:
        axes.append((parameter.expert, shape.num_experts))
    return Place(key, tuple(at for at, _ in axes), tuple(size for _, size in axes))


def _layer_rules(shape: WeightShape, layer: int) -> list[Rule]:
    family = shape.family
    rules = family.attention + (family.moe if shape.moe_layers[layer] else family.dense)
    return [rule for rule in rules if all(shape.size(size) for sizes in rule.sizes for size in sizes)]


def _merged_shape(parameter: Parameter, shape: WeightShape) -> tuple[int, ...]:
    """The parameter's shape before cutting, vocabularies padded."""
    shapes = hf_shapes(parameter, shape)
    rows = shape.padded_vocab_size if parameter.rule.is_vocab else sum(own[0] for own in shapes)
    return (rows, *shapes[0][1:])


def _whole(parameter: Parameter, shape: WeightShape) -> list[Piece]:
    """The pieces of the merged parameter's rows, in order; vocabulary padding, at the end, is in none."""
    rows = [own[0] for own in hf_shapes(parameter, shape)]
    if parameter.rule.merge == "qkv":
        return _query_groups(rows, shape)
    return [Piece(source, 0, count) for source, count in enumerate(rows)]


def _query_groups(rows: list[int], shape: WeightShape) -> list[Piece]:
    """All rows of linear_qkv: for each key-value head its queries, its key, its value."""
    groups = shape.num_kv_heads
    return [
        Piece(source, group * count // groups, (group + 1) * count // groups)
        for group in range(groups)
        for source, count in enumerate(rows)
    ]


def _between(pieces: list[Piece], start: int, stop: int) -> list[Piece]:
    """The part of a run of pieces that lies in rows start … stop - 1 of their concatenation."""
    found, position = [], 0
    for piece in pieces:
        low, high = max(start - position, 0), min(stop - position, piece.stop - piece.start)
        if low < high:
            found.append(Piece(piece.source, piece.start + low, piece.start + high))
        position += piece.stop - piece.start
    return found


def check_shapes(parameter: Parameter, reader: WeightReader, shape: WeightShape) -> None:
    """Raises CheckpointError for an HF tensor that has not the shape which the config implies."""
    for name, expected in zip(parameter.hf, hf_shapes(parameter, shape), strict=True):
        if (found := tuple(reader.shape(name))) != expected:
            raise CheckpointError(f"{name} is {list(found)}, but config.json implies {list(expected)}: they disagree")


def _join(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)
