"""The table of names, merges and shards: round trips bit for bit, and against names and layouts worked out by hand."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dapo_mcore.errors import CheckpointError, ConfigError
from dapo_mcore.weights.mapping import (
    LAYER_RULES,
    WeightShape,
    find_rule,
    hf_names,
    import_parameter,
    join_shards,
    padded_vocab_size,
    split_parameter,
    weight_shape,
)
from tests.actor.parity import DictReader, hf_config

FAMILIES = [("qwen2", False), ("qwen2", True), ("qwen3", False), ("llama", False)]


def hf_state(config: Any) -> dict[str, torch.Tensor]:
    """Transformers' own state, every tensor random; without the output head when it is the embedding."""
    state = AutoModelForCausalLM.from_config(config).state_dict()
    noise = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(tensor.shape, generator=noise)
        for name, tensor in state.items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }


def mcore_names(shape: WeightShape, variant: int = 0) -> Iterator[str]:
    """Megatron's parameter names as its model has them; variant 1 takes Transformer Engine's where they differ."""
    absent = (() if shape.qk_norm else ("q_layernorm", "k_layernorm")) + (() if shape.qkv_bias else ("qkv.bias",))
    yield "embedding.word_embeddings.weight"
    for layer in range(shape.num_layers):
        for rule in LAYER_RULES:
            name = rule.mcore[min(variant, len(rule.mcore) - 1)]
            if not any(part in name for part in absent):
                yield name.format(layer=layer)
    yield "decoder.final_layernorm.weight"
    yield "output_layer.weight"


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("variant", [0, 1])
def test_import_split_join_gives_every_tensor_back(family: str, tied: bool, tensor_parallel: int, variant: int) -> None:
    config = hf_config(family, tied)
    state, shape = hf_state(config), weight_shape(config, tensor_parallel)
    found: dict[str, torch.Tensor] = {}
    for mcore_name in mcore_names(shape, variant):
        rule, layer = find_rule(mcore_name, shape.tied)
        ranks = [
            split_parameter(
                rule,
                layer,
                import_parameter(mcore_name, DictReader(state), shape, rank, tensor_parallel),
                shape,
            )
            for rank in range(tensor_parallel)
        ]
        for pieces in zip(*ranks, strict=True):
            (name,) = {name for name, _ in pieces}
            found[name] = join_shards(rule, [shard for _, shard in pieces], shape)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_names_are_transformers_own(family: str, tied: bool) -> None:
    config = hf_config(family, tied)
    names = list(hf_names(weight_shape(config, 1)))
    assert len(names) == len(set(names))
    assert set(names) == set(hf_state(config))


def tiny_shape(**changes: Any) -> WeightShape:
    sizes: dict[str, Any] = dict(num_layers=1, num_heads=4, num_kv_heads=2, head_dim=1, vocab_size=3)
    flags = dict(padded_vocab_size=16, tied=False, qk_norm=False, qkv_bias=True)
    return WeightShape(**{**sizes, **flags, **changes})


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]


def test_query_groups_are_interleaved() -> None:
    """Four query heads of one row share two key and value heads: each group holds its queries, its key, its value."""
    layer = "model.layers.0.self_attn."
    state = {
        f"{layer}q_proj.weight": column(10, 11, 12, 13),
        f"{layer}k_proj.weight": column(20, 21),
        f"{layer}v_proj.weight": column(30, 31),
    }
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    whole = import_parameter(name, DictReader(state), tiny_shape(), 0, 1)
    assert whole[:, 0].tolist() == [10, 11, 20, 30, 12, 13, 21, 31]
    halves = [import_parameter(name, DictReader(state), tiny_shape(), rank, 2)[:, 0].tolist() for rank in (0, 1)]
    assert halves == [[10, 11, 20, 30], [12, 13, 21, 31]]


def test_heads_of_several_rows_and_biases_interleave_by_whole_heads() -> None:
    layer = "model.layers.0.self_attn."
    state = {
        f"{layer}q_proj.bias": torch.tensor([10.0, 10.5, 11.0, 11.5]),
        f"{layer}k_proj.bias": torch.tensor([20.0, 20.5, 21.0, 21.5]),
        f"{layer}v_proj.bias": torch.tensor([30.0, 30.5, 31.0, 31.5]),
    }
    shape = tiny_shape(num_heads=2, head_dim=2)
    merged = import_parameter("decoder.layers.0.self_attention.linear_qkv.bias", DictReader(state), shape, 0, 1)
    assert merged.tolist() == [10, 10.5, 20, 20.5, 30, 30.5, 11, 11.5, 21, 21.5, 31, 31.5]


def test_gate_and_up_are_cut_before_they_are_stacked() -> None:
    state = {
        "model.layers.0.mlp.gate_proj.weight": column(1, 2, 3, 4),
        "model.layers.0.mlp.up_proj.weight": column(5, 6, 7, 8),
    }
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    shards = [import_parameter(name, DictReader(state), tiny_shape(), rank, 2)[:, 0].tolist() for rank in (0, 1)]
    assert shards == [[1, 2, 5, 6], [3, 4, 7, 8]]


def test_row_parallel_weights_are_cut_along_their_columns() -> None:
    state = {"model.layers.0.mlp.down_proj.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    shards = [
        import_parameter("decoder.layers.0.mlp.linear_fc2.weight", DictReader(state), tiny_shape(), rank, 2).tolist()
        for rank in (0, 1)
    ]
    assert shards == [[[1], [3]], [[2], [4]]]


def test_vocabulary_is_padded_with_zeros_and_cut_again() -> None:
    """Three words on two ranks of eight rows: the second rank holds nothing but padding."""
    state = {"model.embed_tokens.weight": column(7, 8, 9), "lm_head.weight": column(4, 5, 6)}
    for name, words in (("embedding.word_embeddings.weight", [7, 8, 9]), ("output_layer.weight", [4, 5, 6])):
        shards = [import_parameter(name, DictReader(state), tiny_shape(), rank, 2) for rank in (0, 1)]
        assert shards[0][:, 0].tolist() == [*words, 0, 0, 0, 0, 0]
        assert shards[1][:, 0].tolist() == [0] * 8
        assert join_shards(find_rule(name, tied=False)[0], shards, tiny_shape())[:, 0].tolist() == words


def test_a_tied_output_layer_is_the_embedding() -> None:
    state = {"model.embed_tokens.weight": column(7, 8, 9)}
    tied = tiny_shape(tied=True)
    assert import_parameter("output_layer.weight", DictReader(state), tied, 0, 2)[:3, 0].tolist() == [7, 8, 9]


@pytest.mark.parametrize(
    ("vocab_size", "tensor_parallel", "padded"), [(16, 2, 16), (17, 2, 32), (1, 1, 8), (61, 4, 64)]
)
def test_padded_vocabulary(vocab_size: int, tensor_parallel: int, padded: int) -> None:
    assert padded_vocab_size(vocab_size, tensor_parallel) == padded


def test_a_vocabulary_that_config_and_weights_disagree_on() -> None:
    state = {"model.embed_tokens.weight": column(7, 8, 9, 10)}
    with pytest.raises(CheckpointError, match=r"has 4 rows, but config\.json says vocab_size 3"):
        import_parameter("embedding.word_embeddings.weight", DictReader(state), tiny_shape(), 0, 1)


def test_shapes_come_from_the_configuration() -> None:
    shape = weight_shape(hf_config("qwen3"), 2)
    assert shape == WeightShape(
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        vocab_size=61,
        padded_vocab_size=64,
        tied=False,
        qk_norm=True,
        qkv_bias=False,
    )
    assert weight_shape(hf_config("qwen2", tied=True), 1).qkv_bias
    assert weight_shape(hf_config("llama"), 1).head_dim == 16


def test_the_class_names_an_architecture_that_the_file_does_not() -> None:
    config = hf_config("qwen3")
    config.architectures = None
    assert weight_shape(config, 1).qk_norm


def test_unsupported_architectures_are_named() -> None:
    config = SimpleNamespace(architectures=["GPT2LMHeadModel"])
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel is not supported; supported are Qwen2ForCausalLM, Qwen3"):
        weight_shape(config, 1)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_attention_biases_are_refused_where_they_include_the_output_projection(family: str) -> None:
    config = hf_config(family)
    config.attention_bias = True
    with pytest.raises(ConfigError, match="attention_bias"):
        weight_shape(config, 1)


@pytest.mark.parametrize(
    "name", ["decoder.layers.0.mlp.router.weight", "decoder.layers.1.linear_qkv.weight", "lm_head"]
)
def test_unknown_parameters_are_named(name: str) -> None:
    with pytest.raises(CheckpointError, match=name):
        find_rule(name, tied=False)
