"""Merged and split weights, against layouts by hand; export restores every family's tensors bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dapo_mcore.architecture.mapping import (
    Parameter,
    checkpoint_slice,
    export_parameter,
    find_parameter,
    hf_shapes,
    import_parameter,
    import_rows,
    local_shape,
    merged_rows,
    parameters,
    row_ranges,
)
from dapo_mcore.architecture.shape import WeightShape, weight_shape
from dapo_mcore.errors import CheckpointError, ConfigError
from tests.actor.parity import DictReader
from tests.model_files.zoo import CONFIGS, config_of


def tiny_shape(**changes: Any) -> WeightShape:
    """Return a Qwen2 shape with one row or column per head, so that layouts can be written by hand."""
    sizes: dict[str, Any] = dict(num_layers=1, hidden_size=1, ffn_size=4, num_heads=4, num_kv_heads=2, head_dim=1)
    rest = dict(architecture="Qwen2ForCausalLM", vocab_size=3, padded_vocab_size=16, tied=False, moe_layers=(False,))
    return WeightShape(**{**sizes, **rest, **changes})


def tiny_experts(**changes: Any) -> WeightShape:
    sizes = dict(num_experts=2, expert_ffn=2, shared_ffn=4, num_layers=2, moe_layers=(True, True))
    return tiny_shape(**{"architecture": "Qwen2MoeForCausalLM", **sizes, **changes})


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]


def shards(name: str, state: dict[str, torch.Tensor], shape: WeightShape, num_ranks: int) -> list[list]:
    """Return each tensor-parallel rank's part of a parameter, a matrix of one column as a list of its rows."""
    parameter = find_parameter(name, shape)
    found = [import_parameter(parameter, DictReader(state), shape, rank, num_ranks) for rank in range(num_ranks)]
    return [(part[:, 0] if part.dim() == 2 and part.shape[1] == 1 else part).tolist() for part in found]


LAYER = "model.layers.0."
QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
FC1, FC2 = "decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.0.mlp.linear_fc2.weight"


def attention(num_kv_heads: int) -> dict[str, torch.Tensor]:
    return {
        f"{LAYER}self_attn.q_proj.weight": column(10, 11, 12, 13),
        f"{LAYER}self_attn.k_proj.weight": column(*range(20, 20 + num_kv_heads)),
        f"{LAYER}self_attn.v_proj.weight": column(*range(30, 30 + num_kv_heads)),
    }


def test_query_groups_are_interleaved() -> None:
    """Four query heads share two key and value heads: each group holds its queries, its key, its value."""
    assert shards(QKV, attention(2), tiny_shape(), 1) == [[10, 11, 20, 30, 12, 13, 21, 31]]
    assert shards(QKV, attention(2), tiny_shape(), 2) == [[10, 11, 20, 30], [12, 13, 21, 31]]


def test_more_ranks_than_key_value_heads_cut_through_a_group() -> None:
    """Megatron splits the merged rows evenly, even inside a group, and gathers them in the forward pass."""
    one = tiny_shape(num_kv_heads=1)
    assert shards(QKV, attention(1), one, 1) == [[10, 11, 12, 13, 20, 30]]
    assert shards(QKV, attention(1), one, 2) == [[10, 11, 12], [13, 20, 30]]
    assert shards(QKV, attention(2), tiny_shape(), 4) == [[10, 11], [20, 30], [12, 13], [21, 31]]


def test_a_rank_may_hold_parts_of_heads() -> None:
    """Heads of two rows, one key-value head, four ranks: 12 rows in runs of three."""
    state = {
        f"{LAYER}self_attn.q_proj.weight": column(*range(10, 18)),
        f"{LAYER}self_attn.k_proj.weight": column(20, 21),
        f"{LAYER}self_attn.v_proj.weight": column(30, 31),
    }
    shape = tiny_shape(num_kv_heads=1, head_dim=2)
    assert shards(QKV, state, shape, 4) == [[10, 11, 12], [13, 14, 15], [16, 17, 20], [21, 30, 31]]


def test_heads_of_several_rows_and_biases_interleave_by_whole_heads() -> None:
    state = {
        f"{LAYER}self_attn.q_proj.bias": torch.tensor([10.0, 10.5, 11.0, 11.5]),
        f"{LAYER}self_attn.k_proj.bias": torch.tensor([20.0, 20.5, 21.0, 21.5]),
        f"{LAYER}self_attn.v_proj.bias": torch.tensor([30.0, 30.5, 31.0, 31.5]),
    }
    shape = tiny_shape(num_heads=2, head_dim=2)
    name = "decoder.layers.0.self_attention.linear_qkv.bias"
    assert shards(name, state, shape, 1) == [[10, 10.5, 20, 20.5, 30, 30.5, 11, 11.5, 21, 21.5, 31, 31.5]]


def test_gate_and_up_are_cut_before_they_are_stacked() -> None:
    state = {f"{LAYER}mlp.gate_proj.weight": column(1, 2, 3, 4), f"{LAYER}mlp.up_proj.weight": column(5, 6, 7, 8)}
    assert shards(FC1, state, tiny_shape(), 1) == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert shards(FC1, state, tiny_shape(), 2) == [[1, 2, 5, 6], [3, 4, 7, 8]]


def test_row_parallel_weights_are_cut_along_their_columns() -> None:
    state = {f"{LAYER}mlp.down_proj.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    assert shards(FC2, state, tiny_shape(hidden_size=2, ffn_size=2), 2) == [[1, 3], [2, 4]]


def test_norms_are_on_every_rank() -> None:
    state = {f"{LAYER}input_layernorm.weight": torch.tensor([1.0, 2.0])}
    name = "decoder.layers.0.input_layernorm.weight"
    assert shards(name, state, tiny_shape(hidden_size=2), 2) == [[1, 2], [1, 2]]


def test_vocabulary_is_padded_with_zeros_and_cut_again() -> None:
    """Three words on two ranks of eight rows: the second rank holds nothing but padding."""
    state = {"model.embed_tokens.weight": column(7, 8, 9), "lm_head.weight": column(4, 5, 6)}
    shape = tiny_shape()
    for name, words in (("embedding.word_embeddings.weight", [7, 8, 9]), ("output_layer.weight", [4, 5, 6])):
        found = shards(name, state, shape, 2)
        assert found == [[*words, 0, 0, 0, 0, 0], [0] * 8]
        ((_, whole),) = export_parameter(find_parameter(name, shape), [column(*part) for part in found], shape)
        assert whole[:, 0].tolist() == words


def test_a_tied_output_layer_is_the_embedding() -> None:
    state, tied = {"model.embed_tokens.weight": column(7, 8, 9)}, tiny_shape(tied=True)
    assert shards("output_layer.weight", state, tied, 2)[0] == [7, 8, 9, 0, 0, 0, 0, 0]
    assert [parameter.names for parameter in parameters(tied)][-1] == ("decoder.final_layernorm.weight",)


EXPERT = "model.layers.1.mlp.experts.1."


def test_an_expert_is_cut_like_an_mlp() -> None:
    state = {f"{EXPERT}gate_proj.weight": column(1, 2), f"{EXPERT}up_proj.weight": column(3, 4)}
    name = "decoder.layers.1.mlp.experts.local_experts.1.linear_fc1.weight"
    assert shards(name, state, tiny_experts(), 1) == [[1, 2, 3, 4]]
    assert shards(name, state, tiny_experts(), 2) == [[1, 3], [2, 4]]
    state = {f"{EXPERT}down_proj.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    name = "decoder.layers.1.mlp.experts.linear_fc2.weight1"
    assert shards(name, state, tiny_experts(hidden_size=2), 2) == [[1, 3], [2, 4]]


def test_a_shared_expert_is_cut_and_its_gate_and_the_router_are_not() -> None:
    layer, shape = "model.layers.0.mlp.", tiny_experts(hidden_size=2)
    state = {
        f"{layer}shared_expert.down_proj.weight": torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]),
        f"{layer}shared_expert_gate.weight": torch.tensor([[1.0, 2.0]]),
        f"{layer}gate.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    }
    mlp = "decoder.layers.0.mlp."
    assert shards(f"{mlp}shared_experts.linear_fc2.weight", state, shape, 2) == [[[1, 2], [5, 6]], [[3, 4], [7, 8]]]
    assert shards(f"{mlp}shared_experts.gate_weight", state, shape, 2) == [[[1, 2]]] * 2
    assert shards(f"{mlp}router.weight", state, shape, 2) == [[[1, 2], [3, 4]]] * 2


def test_local_shapes_and_row_ranges() -> None:
    shape = tiny_shape(hidden_size=6)
    fc1, fc2, embedding = (find_parameter(name, shape) for name in (FC1, FC2, "embedding.word_embeddings.weight"))
    assert [local_shape(fc1, shape, ranks) for ranks in (1, 2, 4)] == [(8, 6), (4, 6), (2, 6)]
    assert [local_shape(fc2, shape, ranks) for ranks in (1, 2)] == [(6, 4), (6, 2)]
    assert local_shape(embedding, shape, 2) == (8, 6)
    assert row_ranges(fc1, shape, 1, 2) == [(2, 4), (6, 8)]
    assert row_ranges(find_parameter(QKV, shape), shape, 1, 4) == [(2, 4)]


def test_a_parameter_that_cannot_be_split_evenly_is_named() -> None:
    """The halves of gate_up are split separately: three ranks fit neither 4 rows nor the 8 rows of both."""
    for name, told in ((FC1, "3 does not divide the 4 rows of .*linear_fc1"), (FC2, "the 4 columns of .*linear_fc2")):
        with pytest.raises(ConfigError, match=told):
            local_shape(find_parameter(name, tiny_shape()), tiny_shape(), 3)
    with pytest.raises(ConfigError, match="8 does not divide the 4 rows"):
        local_shape(find_parameter(FC1, tiny_shape()), tiny_shape(), 8)


def test_rows_of_a_merged_parameter_and_where_they_come_from() -> None:
    shape, qkv = tiny_shape(), find_parameter(QKV, tiny_shape())
    assert import_rows(qkv, DictReader(attention(2)), shape, 1, 5)[:, 0].tolist() == [11, 20, 30, 12]
    assert merged_rows(qkv, 0, 0, 4, shape) == [(0, 2), (4, 6)]
    assert merged_rows(qkv, 0, 1, 3, shape) == [(1, 2), (4, 5)]
    assert merged_rows(qkv, 2, 0, 2, shape) == [(3, 4), (7, 8)]
    assert merged_rows(find_parameter(FC1, shape), 1, 1, 2, shape) == [(5, 6)]


@pytest.mark.parametrize(
    ("name", "hf"),
    [
        ("decoder.layers.1.input_layernorm.weight", "model.layers.1.input_layernorm.weight"),
        ("decoder.layers.1.self_attention.linear_qkv.layer_norm_weight", "model.layers.1.input_layernorm.weight"),
        ("decoder.layers.1.pre_mlp_layernorm.weight", "model.layers.1.post_attention_layernorm.weight"),
        ("decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight", "model.layers.1.mlp.experts.3.down_proj.weight"),
        ("decoder.layers.1.mlp.experts.linear_fc2.weight3", "model.layers.1.mlp.experts.3.down_proj.weight"),
        ("decoder.layers.1.mlp.router.weight", "model.layers.1.mlp.gate.weight"),
        ("decoder.layers.1.mlp.shared_experts.gate_weight", "model.layers.1.mlp.shared_expert_gate.weight"),
        ("decoder.layers.0.mlp.linear_fc2.weight", "model.layers.0.mlp.down_proj.weight"),
        ("decoder.layers.0.mlp.linear_fc1.layer_norm_weight", "model.layers.0.post_attention_layernorm.weight"),
    ],
)  # fmt: skip
def test_local_and_transformer_engine_names(name: str, hf: str) -> None:
    assert find_parameter(name, weight_shape(config_of("qwen2-moe-mixed"), 1)).hf == (hf,)


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.mlp.router.weight",  # this layer has no experts
        "decoder.layers.3.input_layernorm.weight",  # three layers
        "decoder.layers.1.mlp.experts.local_experts.4.linear_fc2.weight",  # four experts
        "decoder.layers.1.mlp.experts.linear_fc2.weight4",
        "decoder.layers.1.mlp.linear_fc1.weight",
        "decoder.layers.1.self_attention.q_layernorm.weight",
        "decoder.layers.1.linear_qkv.weight",
        "lm_head",
    ],
)
def test_parameters_without_a_rule_are_named(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"no weight rule for the Megatron parameter {name}; add it in"):
        find_parameter(name, weight_shape(config_of("qwen2-moe-mixed"), 1))


def test_tensors_of_another_shape_are_named() -> None:
    state = {"model.embed_tokens.weight": column(7, 8, 9, 10)}
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight is \[4, 1\], but config.json implies \[3, 1\]"):
        import_parameter(
            find_parameter("embedding.word_embeddings.weight", tiny_shape()), DictReader(state), tiny_shape()
        )


def hf_state(shape: WeightShape) -> dict[str, torch.Tensor]:
    """Return random tensors with the names and shapes of the table."""
    noise = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(size, generator=noise)
        for parameter in parameters(shape)
        for name, size in zip(parameter.hf, hf_shapes(parameter, shape), strict=True)
    }


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("family", CONFIGS)
def test_export_gives_back_what_import_was_given(family: str, num_ranks: int) -> None:
    shape = weight_shape(config_of(family), num_ranks)
    state, found = hf_state(shape), {}
    reader = DictReader(state)
    for parameter in parameters(shape):
        parts = [import_parameter(parameter, reader, shape, rank, num_ranks) for rank in range(num_ranks)]
        assert {tuple(part.shape) for part in parts} == {local_shape(parameter, shape, num_ranks)}
        found |= dict(export_parameter(parameter, parts, shape))
    assert found.keys() == state.keys()
    assert [name for name in state if not torch.equal(found[name], state[name])] == []


@pytest.mark.parametrize("family", CONFIGS)
def test_every_parameter_is_found_by_each_of_its_names(family: str) -> None:
    shape = weight_shape(config_of(family), 1)
    every = list(parameters(shape))
    names = [name for parameter in every for name in parameter.names]
    assert len(names) == len(set(names))
    assert all(find_parameter(name, shape) == parameter for parameter in every for name in parameter.names)


def place(family: str, name: str) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    shape = weight_shape(config_of(family), 1)
    return tuple(checkpoint_slice(find_parameter(name, shape), shape))


def test_each_parameter_has_its_place_in_a_checkpoint() -> None:
    """Layers and experts are leading axes; layers that are not alike have keys of their own."""
    expert = "decoder.layers.2.mlp.experts.local_experts.3.linear_fc1.weight"
    assert place("qwen2", "embedding.word_embeddings.weight") == ("embedding.word_embeddings.weight", (), ())
    assert place("qwen2", "decoder.layers.2.input_layernorm.weight") == (
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight", (2,), (3,),
    )  # fmt: skip
    assert place("qwen2-moe", expert) == ("decoder.layers.mlp.experts.experts.linear_fc1.weight", (2, 3), (3, 4))
    assert place("qwen2-moe-mixed", expert) == (
        "decoder.layers.2.mlp.experts.experts.linear_fc1.weight", (3,), (4,),
    )  # fmt: skip
    assert place("qwen2-moe-mixed", "decoder.layers.1.mlp.router.weight") == (
        "decoder.layers.1.mlp.router.weight", (), (),
    )  # fmt: skip


@pytest.mark.parametrize("family", CONFIGS)
def test_places_do_not_collide(family: str) -> None:
    shape = weight_shape(config_of(family), 1)
    places = [checkpoint_slice(parameter, shape)[:2] for parameter in parameters(shape)]
    assert len(places) == len(set(places))


def test_a_parameter_outside_of_layers_has_no_number() -> None:
    first = next(parameters(tiny_shape()))
    assert first == Parameter(first.rule) and first.names == ("embedding.word_embeddings.weight",)
