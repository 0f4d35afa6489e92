"""Every key of config.json is read, required, harmless or refused by name. No processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from dapo_mcore.actor.architecture import FAMILIES, read_architecture
from dapo_mcore.errors import ConfigError
from dapo_mcore.weights import families as weight_table
from tests.actor import families

HUB = json.loads((Path(__file__).parent / "hub_configs.json").read_text())
"""config.json of well-known models, as their folders on the Hub have it."""


def stored(tree: dict[str, Any], folder: Path) -> Any:
    (folder / "config.json").write_text(json.dumps(tree))
    return AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("Qwen2.5-7B", {"add_qkv_bias": True, "qk_layernorm": False, "num_query_groups": 4, "kv_channels": 128}),
        ("Qwen2.5-32B", {"num_layers": 64, "ffn_hidden_size": 27648, "layernorm_epsilon": 1e-5}),
        ("Qwen3-8B", {"add_qkv_bias": False, "qk_layernorm": True, "kv_channels": 128}),
        (
            "Qwen3-30B-A3B",
            {
                "num_moe_experts": 128,
                "moe_router_topk": 8,
                "moe_ffn_hidden_size": 768,
                "moe_layer_freq": 1,
                "moe_router_pre_softmax": False,
                "kv_channels": 128,
                "moe_shared_expert_intermediate_size": None,
            },
        ),
        ("Llama-3.1-8B", {"add_qkv_bias": False, "num_query_groups": 8}),
        ("Llama-3.2-1B", {"kv_channels": 64}),
        ("Mistral-7B-v0.3", {"num_query_groups": 8, "kv_channels": 128}),
        ("Mixtral-8x7B-v0.1", {"num_moe_experts": 8, "moe_ffn_hidden_size": 14336, "moe_router_pre_softmax": False}),
        (
            "Qwen1.5-MoE-A2.7B",
            {
                "num_moe_experts": 60,
                "moe_router_pre_softmax": True,
                "moe_shared_expert_intermediate_size": 5632,
                "moe_shared_expert_gate": True,
                "add_qkv_bias": True,
            },
        ),
    ],
)
def test_well_known_models_are_understood(model, expected, tmp_path):
    found = read_architecture(stored(HUB[model], tmp_path), longest_sequence=32768)
    assert {key: found.fields[key] for key in expected} == expected
    assert found.name == HUB[model]["architectures"][0]
    assert found.tied == HUB[model]["tie_word_embeddings"]
    assert found.rope.base == HUB[model]["rope_theta"]
    assert (found.vocab_size, found.max_positions) == (
        HUB[model]["vocab_size"],
        HUB[model]["max_position_embeddings"],
    )


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        ("Qwen3-8B", {"hidden_act": "gelu"}, "hidden_act 'gelu' .* supported is 'silu'"),
        ("Llama-3.1-8B", {"attention_bias": True}, "attention_bias True"),
        ("Llama-3.1-8B", {"mlp_bias": True}, "mlp_bias True"),
        ("Qwen2.5-7B", {"attention_dropout": 0.1}, r"attention_dropout 0\.1"),
        ("Mixtral-8x7B-v0.1", {"router_jitter_noise": 0.01}, r"router_jitter_noise 0\.01"),
        ("Llama-3.1-8B", {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping 50\.0 .* is not understood"),
        ("Qwen2.5-7B", {"dual_chunk_attention_config": {"chunk_size": 262144}}, "dual_chunk_attention_config"),
        ("Qwen2.5-7B", {"use_mrope": True}, "use_mrope True"),
        ("Qwen2.5-7B", {"scale_queries": False}, "scale_queries False"),
        ("Llama-3.1-8B", {"num_experts": 4}, "num_experts 4 .* is not understood for LlamaForCausalLM"),
        ("DeepSeek-V3", {}, "quantization_config .* is not supported for DeepseekV3ForCausalLM"),
        ("Qwen3-8B", {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid' .* is not understood for Qwen3ForCausalLM"),
        ("Qwen3-8B", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("Qwen2.5-7B", {"layer_types": ["full_attention"] * 27 + ["linear_attention"]}, "linear_attention"),
        ("Qwen3-30B-A3B", {"num_experts_per_tok": 1}, "num_experts_per_tok 1 with normalized"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(model, change, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        read_architecture(stored(HUB[model] | change, tmp_path), 1024)


@pytest.mark.parametrize(
    ("model", "change"),
    [
        ("Mistral-7B-v0.1", {}),
        ("Qwen2.5-7B", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 20}),
        ("Qwen1.5-MoE-A2.7B", {"use_sliding_window": True, "sliding_window": 4096}),
        ("Qwen3-30B-A3B", {"use_sliding_window": True, "sliding_window": 4096}),
    ],
)
def test_a_sliding_window_is_refused_only_where_it_is_narrower_than_the_sequences(model, change, tmp_path):
    config = stored(HUB[model] | change, tmp_path)
    assert read_architecture(config, longest_sequence=4096)
    with pytest.raises(ConfigError, match="sliding_window 4096 is narrower than the longest training sequence, 4097"):
        read_architecture(config, longest_sequence=4097)


def test_a_window_above_max_window_layers_changes_no_layer(tmp_path):
    unused = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 28}
    assert read_architecture(stored(HUB["Qwen2.5-7B"] | unused, tmp_path), longest_sequence=32768)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"mlp_only_layers": [0, 2]}, [0, 1, 0]),
        ({"mlp_only_layers": [], "decoder_sparse_step": 2}, [0, 1, 0]),
        ({"mlp_only_layers": []}, 1),
    ],
)
def test_which_layers_have_experts(change, expected):
    assert read_architecture(families.hf_config("qwen2-moe", **change), 64).fields["moe_layer_freq"] == expected


def test_a_model_whose_layers_are_all_dense_has_no_experts():
    found = read_architecture(families.hf_config("qwen2-moe", mlp_only_layers=[0, 1, 2]), 64)
    assert found.num_experts is None


def test_unknown_architecture_is_refused():
    config = families.hf_config("llama")
    config.architectures = ["GPT2LMHeadModel"]
    with pytest.raises(
        ConfigError, match="architecture GPT2LMHeadModel is not supported; supported are Qwen2ForCausalLM"
    ):
        read_architecture(config, 64)


def test_every_family_has_a_model_in_the_tests():
    assert {f"{kind}ForCausalLM" for kind, _ in families.FAMILIES.values()} == set(FAMILIES)


def test_every_architecture_of_the_weight_table_is_understood() -> None:
    assert FAMILIES.keys() == weight_table.FAMILIES.keys()
