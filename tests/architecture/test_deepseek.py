"""DeepSeek-V3's config in Megatron's terms. tests/actor/model/test_policy.py compares what the model computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from dapo_mcore.actor.model.transformer_config import check_mesh
from dapo_mcore.architecture.reader import read_architecture
from dapo_mcore.errors import ConfigError
from tests.actor import families
from tests.actor.parity import Mesh, make_config

HUB = json.loads((Path(__file__).parent / "hub_configs.json").read_text())["DeepSeek-V3"]


def read(folder: Path, **changes):
    tree = {key: value for key, value in HUB.items() if key != "quantization_config"} | changes
    (folder / "config.json").write_text(json.dumps(tree))
    return read_architecture(AutoConfig.from_pretrained(folder), 4096).fields


def test_the_published_config_in_bf16_is_understood(tmp_path):
    expected = {
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_head_dim": 128,
        "qk_pos_emb_head_dim": 64,
        "v_head_dim": 128,
        "rope_type": "yarn",
        "rotary_scaling_factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "num_moe_experts": 256,
        "moe_router_topk": 8,
        "moe_router_num_groups": 8,
        "moe_router_group_topk": 4,
        "moe_router_score_function": "sigmoid",
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_bias_update_rate": 0.0,
        "moe_shared_expert_intermediate_size": 2048,
        "moe_layer_freq": [0] * 3 + [1] * 58,
    }
    found = read(tmp_path)
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scoring_func": "softmax"}, "scoring_func 'softmax' .* supported is 'sigmoid'"),
        ({"topk_method": "greedy"}, "topk_method 'greedy'"),
        ({"norm_topk_prob": False}, "norm_topk_prob False"),
        (
            {"num_experts_per_tok": 6},
            "num_experts_per_tok 6 over topk_group 4 groups: .* supported is twice topk_group",
        ),
        ({"num_key_value_heads": 8}, "num_key_value_heads 8 differs from num_attention_heads 128"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "are not supported with latent attention"),
        ({"rope_scaling": HUB["rope_scaling"] | {"mscale": 0}}, "mscale_all_dim only together with mscale"),
    ],
)
def test_a_setting_that_megatron_computes_differently_is_refused(change, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, **change)


def test_groups_that_limit_nothing_leave_the_number_of_experts_free(tmp_path):
    found = read(tmp_path, n_group=1, topk_group=1, num_experts_per_tok=6)
    assert found["moe_router_num_groups"] is None


def test_latent_attention_over_tensor_parallel_ranks_needs_sequence_parallel():
    dense = families.hf_config("deepseek-v3", first_k_dense_replace=3)
    with pytest.raises(ConfigError, match="tensor_parallel 2 with latent attention needs sequence_parallel"):
        check_mesh(read_architecture(dense, 64), make_config(Mesh(tensor=2)).parallel)
