"""From a Hugging Face config to Megatron's: what is refused, and in which words. No processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dapo_mcore.actor.model import check_divisibility, rope_arguments, transformer_config, uses_transformer_engine
from dapo_mcore.errors import ConfigError
from dapo_mcore.weights.mapping import weight_shape
from tests.actor.parity import Mesh, hf_config, make_config


def check(mesh: Mesh, **changes):
    hf = hf_config()
    for key, value in changes.items():
        setattr(hf, key, value)
    check_divisibility(hf, weight_shape(hf, mesh.tensor), make_config(mesh).parallel)


def test_tensor_parallel_must_divide_the_heads():
    with pytest.raises(ConfigError, match=r"tensor_parallel 3 does not divide num_attention_heads 4; use 1 or 2"):
        check(Mesh(tensor=3))


def test_tensor_parallel_must_divide_the_key_value_heads():
    with pytest.raises(ConfigError, match=r"tensor_parallel 4 does not divide num_key_value_heads 2; use 1 or 2"):
        check(Mesh(tensor=4))


def test_tensor_parallel_must_divide_the_feed_forward_size():
    with pytest.raises(ConfigError, match=r"tensor_parallel 2 does not divide intermediate_size 97; use 1"):
        check(Mesh(tensor=2), intermediate_size=97)


def test_pipeline_parallel_must_divide_the_layers():
    with pytest.raises(ConfigError, match=r"pipeline_parallel 3 does not divide num_hidden_layers 4; use 1, 2 or 4"):
        check(Mesh(pipeline=3))


def test_vocabulary_that_does_not_divide_is_padded():
    shape = weight_shape(hf_config(), tensor_parallel=2)
    assert (shape.vocab_size, shape.padded_vocab_size) == (61, 64)
    check(Mesh(tensor=2))


def test_megatron_section_passes_upstream_fields_through():
    config = make_config(Mesh(), megatron={"deallocate_pipeline_outputs": True})
    built = transformer_config(config, hf_config(), weight_shape(hf_config(), 1))
    assert built.deallocate_pipeline_outputs is True


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_siz", 64, r"megatron\.hidden_siz is not a field .*did you mean 'hidden_size'"),
        ("hidden_size", 64, r"megatron\.hidden_size is decided by .*here 64"),
    ],
)
def test_megatron_section_refuses_unknown_and_owned_keys(key, value, message):
    config = make_config(Mesh(), megatron={key: value})
    with pytest.raises(ConfigError, match=message):
        transformer_config(config, hf_config(), weight_shape(hf_config(), 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"mlp_bias": True}, "mlp_bias"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(change, message):
    hf = hf_config()
    for key, value in change.items():
        setattr(hf, key, value)
    with pytest.raises(ConfigError, match=message):
        transformer_config(make_config(Mesh()), hf, weight_shape(hf_config(), 1))


def test_unknown_architecture_is_refused():
    with pytest.raises(
        ConfigError, match=r"architecture GPT2LMHeadModel is not supported; supported are Qwen2ForCausalLM"
    ):
        weight_shape(SimpleNamespace(architectures=["GPT2LMHeadModel"]), 1)


LLAMA3 = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_theta": 1e6, "rope_type": "default"}, {"rotary_base": 1e6}),
        (
            {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0},
            {"rotary_base": 1e4, "seq_len_interpolation_factor": 2.0},
        ),
        (
            LLAMA3 | {"original_max_position_embeddings": 8192},
            {"rotary_base": 5e5, "rope_scaling": True, "rope_scaling_factor": 8.0},
        ),
    ],
)
def test_rope_scaling(rope, expected):
    assert rope_arguments(SimpleNamespace(rope_parameters=rope)) == expected


@pytest.mark.parametrize("rope", [{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}, LLAMA3])
def test_rope_scaling_that_megatron_lacks_is_refused(rope):
    with pytest.raises(ConfigError, match="rope scaling"):
        rope_arguments(SimpleNamespace(rope_parameters=rope))


def test_transformer_engine_is_refused_where_it_cannot_run():
    config = make_config(Mesh(), model__transformer_impl="transformer_engine")
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        uses_transformer_engine(config.model)
