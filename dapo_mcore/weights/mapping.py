"""Hugging Face ↔ Megatron weights as one table: names, how tensors merge, how they shard. No collectives, no files.

Change here: to support an architecture, or a name that Megatron changed. Loading, export and weight sync read this table.

A Megatron parameter is made of one or more HF tensors (`linear_qkv` of q, k and v). Sharding comes first, merging
second: every HF tensor is cut along its own dim for a tensor-parallel rank, and the pieces are merged locally. Reading
slices and gathering shards therefore never needs a whole merged tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from dapo_mcore.errors import CheckpointError, ConfigError

Merge = Literal["one", "qkv", "gate_up"]

SUPPORTED = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM")


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter.

    mcore   its names: with the local spec, and where it differs, with Transformer Engine's fused layers
    hf      the HF tensors it is made of, in merge order
    dim     the dim along which each HF tensor is cut for tensor parallelism; None replicates
    merge   `one`: as it is; `qkv`: interleaved by query group; `gate_up`: stacked
    vocab   rows are padded to the padded vocabulary
    """

    mcore: tuple[str, ...]
    hf: tuple[str, ...]
    dim: int | None = None
    merge: Merge = "one"
    vocab: bool = False


_LAYER = "decoder.layers.{layer}."
_HF_LAYER = "model.layers.{layer}."

EMBEDDING = Rule(("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), dim=0, vocab=True)
OUTPUT = Rule(("output_layer.weight",), ("lm_head.weight",), dim=0, vocab=True)
TIED_OUTPUT = Rule(("output_layer.weight",), ("model.embed_tokens.weight",), dim=0, vocab=True)
FINAL_NORM = Rule(("decoder.final_layernorm.weight",), ("model.norm.weight",))


def _layer_rule(mcore: tuple[str, ...], hf: tuple[str, ...], dim: int | None = None, merge: Merge = "one") -> Rule:
    return Rule(tuple(_LAYER + name for name in mcore), tuple(_HF_LAYER + name for name in hf), dim, merge)


def _projections(kind: str) -> tuple[str, ...]:
    return tuple(f"self_attn.{letter}_proj.{kind}" for letter in "qkv")


LAYER_RULES = (
    _layer_rule(("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"), ("input_layernorm.weight",)),
    _layer_rule(("self_attention.linear_qkv.weight",), _projections("weight"), 0, "qkv"),
    _layer_rule(("self_attention.linear_qkv.bias",), _projections("bias"), 0, "qkv"),
    _layer_rule(("self_attention.q_layernorm.weight",), ("self_attn.q_norm.weight",)),
    _layer_rule(("self_attention.k_layernorm.weight",), ("self_attn.k_norm.weight",)),
    _layer_rule(("self_attention.linear_proj.weight",), ("self_attn.o_proj.weight",), 1),
    _layer_rule(("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"), ("post_attention_layernorm.weight",)),
    _layer_rule(("mlp.linear_fc1.weight",), ("mlp.gate_proj.weight", "mlp.up_proj.weight"), 0, "gate_up"),
    _layer_rule(("mlp.linear_fc2.weight",), ("mlp.down_proj.weight",), 1),
)


@dataclass(frozen=True)
class WeightShape:
    """The sizes that slicing and merging need; all global (before tensor parallelism)."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    padded_vocab_size: int
    tied: bool
    qk_norm: bool
    qkv_bias: bool


class WeightReader(Protocol):
    """Access to HF tensors by name and slice; hf_io reads files, tests pass a dictionary."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> torch.Tensor:
        """The tensor, or its slice [start, stop) along `dim`."""
        ...


def weight_shape(hf_config: Any, tensor_parallel: int) -> WeightShape:
    """Sizes from a transformers config. Raises ConfigError for an architecture that is not in the table."""
    architecture = (getattr(hf_config, "architectures", None) or [f"{type(hf_config).__name__}"])[0]
    name = architecture.replace("Config", "ForCausalLM") if architecture.endswith("Config") else architecture
    if name not in SUPPORTED:
        raise ConfigError(f"architecture {architecture} is not supported; supported are {', '.join(SUPPORTED)}")
    if getattr(hf_config, "attention_bias", False):
        raise ConfigError(
            f"attention_bias true is not supported: {name}'s o_proj.bias has no Megatron counterpart here"
        )
    heads = hf_config.num_attention_heads
    return WeightShape(
        num_layers=hf_config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=hf_config.num_key_value_heads,
        head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads,
        vocab_size=hf_config.vocab_size,
        padded_vocab_size=padded_vocab_size(hf_config.vocab_size, tensor_parallel),
        tied=hf_config.tie_word_embeddings,
        qk_norm=name == "Qwen3ForCausalLM",
        qkv_bias=name == "Qwen2ForCausalLM",
    )


def padded_vocab_size(vocab_size: int, tensor_parallel: int, align: int = 8) -> int:
    """The vocabulary rounded up so that every tensor-parallel shard is a multiple of `align` (tensor-core tiles)."""
    unit = tensor_parallel * align
    return -(-vocab_size // unit) * unit


def find_rule(mcore_name: str, tied: bool) -> tuple[Rule, int | None]:
    """The rule of a Megatron parameter name with global layer number, and that number. Raises CheckpointError."""
    match = re.match(r"decoder\.layers\.(\d+)\.", mcore_name)
    layer = int(match.group(1)) if match else None
    candidates = LAYER_RULES if match else (EMBEDDING, TIED_OUTPUT if tied else OUTPUT, FINAL_NORM)
    for rule in candidates:
        if mcore_name in (name.format(layer=layer) for name in rule.mcore):
            return rule, layer
    raise CheckpointError(f"no mapping rule for Megatron parameter {mcore_name}; extend weights/mapping.py")


def import_parameter(
    mcore_name: str, reader: WeightReader, shape: WeightShape, tensor_rank: int, tensor_parallel: int
) -> torch.Tensor:
    """This tensor-parallel rank's Megatron parameter, read slice by slice from HF tensors."""
    rule, layer = find_rule(mcore_name, shape.tied)
    pieces = [
        _read_shard(reader, name.format(layer=layer), rule, shape, tensor_rank, tensor_parallel) for name in rule.hf
    ]
    return _merge(rule, pieces, shape)


def split_parameter(
    rule: Rule, layer: int | None, local: torch.Tensor, shape: WeightShape
) -> list[tuple[str, torch.Tensor]]:
    """The (HF name, local shard) pairs of a local Megatron parameter: the inverse of the merge."""
    pieces = _split(rule, local, shape)
    return [(name.format(layer=layer), piece) for name, piece in zip(rule.hf, pieces, strict=True)]


def join_shards(rule: Rule, shards: list[torch.Tensor], shape: WeightShape) -> torch.Tensor:
    """The full HF tensor from the tensor-parallel ranks' shards, vocabulary padding removed."""
    full = shards[0] if rule.dim is None else torch.cat(shards, dim=rule.dim)
    return full[: shape.vocab_size] if rule.vocab else full


def hf_names(shape: WeightShape) -> Iterator[str]:
    """Every HF tensor name that a model of this shape exports, in file order."""
    yield from EMBEDDING.hf
    for layer in range(shape.num_layers):
        for rule in LAYER_RULES:
            if _applies(rule, shape):
                yield from (name.format(layer=layer) for name in rule.hf)
    yield from FINAL_NORM.hf
    if not shape.tied:
        yield from OUTPUT.hf


def _applies(rule: Rule, shape: WeightShape) -> bool:
    name = rule.mcore[0]
    return (shape.qk_norm or not name.endswith(("q_layernorm.weight", "k_layernorm.weight"))) and (
        shape.qkv_bias or not name.endswith("linear_qkv.bias")
    )


def _read_shard(
    reader: WeightReader, name: str, rule: Rule, shape: WeightShape, tensor_rank: int, tensor_parallel: int
) -> torch.Tensor:
    if rule.dim is None:
        return reader.read(name)
    rows = reader.shape(name)[rule.dim]
    if rule.vocab and rows != shape.vocab_size:
        raise CheckpointError(f"{name} has {rows} rows, but config.json says vocab_size {shape.vocab_size}")
    size = (shape.padded_vocab_size if rule.vocab else rows) // tensor_parallel
    start = tensor_rank * size
    stop = min(start + size, rows)
    piece = reader.read(name, rule.dim, min(start, rows), stop)
    missing = size - piece.size(rule.dim)
    return torch.cat([piece, piece.new_zeros(missing, *piece.shape[1:])]) if missing else piece


def _merge(rule: Rule, pieces: list[torch.Tensor], shape: WeightShape) -> torch.Tensor:
    if rule.merge == "one":
        return pieces[0]
    if rule.merge == "gate_up":
        return torch.cat(pieces)
    groups = pieces[1].size(0) // shape.head_dim
    rest = pieces[0].shape[1:]
    return torch.cat([piece.view(groups, -1, *rest) for piece in pieces], dim=1).flatten(0, 1)


def _split(rule: Rule, local: torch.Tensor, shape: WeightShape) -> list[torch.Tensor]:
    if rule.merge == "one":
        return [local]
    if rule.merge == "gate_up":
        return list(local.chunk(2))
    queries = shape.num_heads // shape.num_kv_heads
    sizes = [queries * shape.head_dim, shape.head_dim, shape.head_dim]
    groups = local.size(0) // sum(sizes)
    parts = local.view(groups, sum(sizes), *local.shape[1:]).split(sizes, dim=1)
    return [part.reshape(-1, *local.shape[1:]) for part in parts]
