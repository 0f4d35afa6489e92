"""Sizes from config.json, by hand, and configs whose tensors the weight rules do not cover."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dapo_mcore.architecture.shape import WeightShape, padded_vocab_size, weight_shape
from dapo_mcore.errors import ConfigError
from tests.model_files.zoo import config_of


def test_a_dense_model() -> None:
    """The zoo's Qwen3: head_dim 16 is not hidden 32 / 4 heads."""
    assert weight_shape(config_of("qwen3"), 2) == WeightShape(
        architecture="Qwen3ForCausalLM", num_layers=3, hidden_size=32, ffn_size=48, num_heads=4, num_kv_heads=2,
        head_dim=16, vocab_size=101, padded_vocab_size=112, tied=False, moe_layers=(False,) * 3,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("family", "expert_ffn", "shared_ffn", "moe_layers"),
    [
        ("mixtral", 48, 0, (True, True, True)),  # its experts have the size of the MLP
        ("qwen2-moe", 24, 40, (True, True, True)),
        ("qwen2-moe-mixed", 24, 40, (False, True, True)),
        ("qwen3-moe", 24, 0, (True, True, True)),
    ],
)
def test_models_with_experts(family: str, expert_ffn: int, shared_ffn: int, moe_layers: tuple[bool, ...]) -> None:
    shape = weight_shape(config_of(family), 1)
    assert (shape.num_experts, shape.expert_ffn, shape.shared_ffn) == (4, expert_ffn, shared_ffn)
    assert shape.moe_layers == moe_layers
    assert shape.layers_are_alike == (len(set(moe_layers)) == 1)


def test_experts_in_every_second_layer() -> None:
    assert weight_shape(config_of("qwen3-moe", decoder_sparse_step=2), 1).moe_layers == (False, True, False)


def test_head_dim_and_kv_heads_have_defaults() -> None:
    shape = weight_shape(config_of("llama", num_key_value_heads=None, head_dim=None), 1)
    assert (shape.num_kv_heads, shape.head_dim) == (4, 8)


def test_sizes_by_name() -> None:
    shape = weight_shape(config_of("qwen2-moe", head_dim=10), 1)
    names = ("hidden", "ffn", "query", "key", "head", "vocab", "experts", "expert_ffn", "shared_ffn", "one")
    assert [shape.size(name) for name in names] == [32, 48, 40, 20, 10, 101, 4, 24, 40, 1]


@pytest.mark.parametrize(
    ("vocab_size", "tensor_parallel", "padded"), [(16, 2, 16), (17, 2, 32), (1, 1, 8), (61, 4, 64), (101, 4, 128)]
)
def test_padded_vocabulary(vocab_size: int, tensor_parallel: int, padded: int) -> None:
    assert padded_vocab_size(vocab_size, tensor_parallel) == padded


def test_a_config_without_an_architecture_gets_that_of_its_class() -> None:
    config = config_of("qwen3")
    config.architectures = None
    assert weight_shape(config, 1).architecture == "Qwen3ForCausalLM"


def test_unsupported_architectures_are_named() -> None:
    config = SimpleNamespace(architectures=["GPT2LMHeadModel"])
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel is not supported; supported are Qwen2ForCausalLM, Qwen3"):
        weight_shape(config, 1)


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        ("qwen3", {"attention_bias": True}, "attention_bias true is not supported: Qwen3ForCausalLM's o_proj.bias"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias true"),
        ("qwen2-moe", {"qkv_bias": False}, "qkv_bias false"),
    ],
)
def test_settings_that_change_the_tensors_are_refused(family: str, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        weight_shape(config_of(family, **changes), 1)


def test_key_value_heads_must_divide_the_heads() -> None:
    config = SimpleNamespace(architectures=["Qwen2ForCausalLM"], num_attention_heads=6, num_key_value_heads=4)
    with pytest.raises(ConfigError, match="num_key_value_heads 4 does not divide num_attention_heads 6"):
        weight_shape(config, 1)
