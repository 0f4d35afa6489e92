"""Every key of config.json is read, required, harmless or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from dapo_mcore.architecture.families import FAMILIES
from dapo_mcore.architecture.reader import Architecture, read_architecture
from dapo_mcore.config.model import ModelConfig
from dapo_mcore.errors import ConfigError
from dapo_mcore.model_files.hf_config import load_hf_config
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
        ("Qwen3-30B-A3B", {"use_qk_norm": False}, "use_qk_norm False .* supported is True"),
        (
            "Qwen3-30B-A3B",
            {"shared_expert_intermediate_size": 64},
            "shared_expert_intermediate_size 64 .* supported is 0",
        ),
        ("Qwen1.5-MoE-A2.7B", {"qkv_bias": False}, "qkv_bias false .* weight rules expect q, k and v biases"),
        ("SmolLM2-135M", {"rope_interleaved": True}, "rope_interleaved True"),
        (
            "Qwen3-8B",
            {"hidden_act": "gelu", "one": 1, "two": 2},
            "hidden_act 'gelu' .* supported is 'silu'; one 1, two 2 in config.json are not understood",
        ),
        ("Qwen3-8B", {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid' .* is not understood for Qwen3ForCausalLM"),
        ("Qwen3-8B", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("Qwen2.5-7B", {"layer_types": ["full_attention"] * 27 + ["linear_attention"]}, "linear_attention"),
        ("Qwen3-30B-A3B", {"num_experts_per_tok": 1}, "num_experts_per_tok 1 with normalized"),
    ],
)
def test_a_setting_that_is_not_understood_is_refused_by_name(model, change, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        read_architecture(stored(HUB[model] | change, tmp_path), 1024)


def read(tree: dict[str, Any], folder: Path) -> Architecture:
    (folder / "config.json").write_text(json.dumps(tree))
    return read_architecture(load_hf_config(ModelConfig(path=str(folder))), longest_sequence=4096)


REFUSED = {
    "DeepSeek-V3": "quantization_config .* take the model's bf16 weights, or dequantize these",
    "GLM-4-9B": "architecture Glm4ForCausalLM is not supported; supported are Qwen2ForCausalLM",
    "Llama_attention_bias": "attention_bias True in config.json is not supported for LlamaForCausalLM; supported is False",
    "Llama_dynamic_NTK": "rope_type 'dynamic' is not supported .* supported are default, linear, llama3, yarn",
    "Llama_longrope": "rope_type 'longrope' is not supported",
    "Qwen2.5-VL-3B": "architecture Qwen2_5_VLForConditionalGeneration is not supported",
    "Qwen3-8B-FP8": "quantization_config",
    "Qwen3-Next-80B-A3B": "architecture Qwen3NextForCausalLM is not supported",
    "gpt-oss-20b": "architecture GptOssForCausalLM is not supported",
}
EXPERTS = {
    "num_moe_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "moe_router_topk": ("num_experts_per_tok",),
}


@pytest.mark.parametrize("model", HUB)
def test_published_models_are_accepted_or_refused_with_the_reason(model, tmp_path):
    tree = HUB[model]
    if model in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[model]):
            read(tree, tmp_path)
        return
    found = read(tree, tmp_path)
    heads = tree["num_attention_heads"]
    facts = {
        "num_layers": tree["num_hidden_layers"],
        "hidden_size": tree["hidden_size"],
        "ffn_hidden_size": tree["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": tree.get("num_key_value_heads", heads),
        "layernorm_epsilon": tree["rms_norm_eps"],
        "add_qkv_bias": tree["architectures"][0].startswith("Qwen2"),
        **{ours: next((tree[name] for name in names if name in tree), None) for ours, names in EXPERTS.items()},
    }
    assert {name: found.fields.get(name) for name in facts} == facts
    assert (found.rope.base, found.vocab_size, found.tied) == (
        tree.get("rope_theta", 10000.0), tree["vocab_size"], tree.get("tie_word_embeddings", False),
    )  # fmt: skip


def test_unquantized_deepseek_v3_is_accepted(tmp_path):
    """Its keys for DeepSeek's own training loss have no effect here."""
    tree = {key: value for key, value in HUB["DeepSeek-V3"].items() if key != "quantization_config"}
    found = read_architecture(stored(tree, tmp_path), 4096)
    assert (found.fields["num_moe_experts"], found.fields["moe_router_group_topk"], found.num_layers) == (256, 4, 61)
    assert found.fields["moe_layer_freq"] == [0] * 3 + [1] * 58


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
