"""Small random checkpoints of every supported architecture, made by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

SIZES = dict(
    vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
DEEPSEEK = dict(
    num_key_value_heads=4, n_routed_experts=4, n_shared_experts=2, num_experts_per_tok=2, moe_intermediate_size=24,
    first_k_dense_replace=1, n_group=2, topk_group=1, q_lora_rank=20, kv_lora_rank=12, qk_nope_head_dim=8,
    qk_rope_head_dim=4, v_head_dim=6,
)  # fmt: skip

CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "qwen2": (Qwen2Config, {}),
    "qwen2-tied": (Qwen2Config, dict(tie_word_embeddings=True)),
    "qwen3": (Qwen3Config, dict(head_dim=16)),
    "llama": (LlamaConfig, dict(num_key_value_heads=4)),
    "mistral": (MistralConfig, dict(num_key_value_heads=1, sliding_window=None)),
    "mixtral": (MixtralConfig, dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen2-moe": (Qwen2MoeConfig, EXPERTS | dict(shared_expert_intermediate_size=40)),
    "qwen2-moe-mixed": (Qwen2MoeConfig, EXPERTS | dict(shared_expert_intermediate_size=40, mlp_only_layers=[0])),
    "deepseek-v3": (DeepseekV3Config, DEEPSEEK),
    "deepseek-v3-direct": (DeepseekV3Config, DEEPSEEK | dict(q_lora_rank=None, first_k_dense_replace=0)),
    "qwen3-moe": (Qwen3MoeConfig, EXPERTS | dict(head_dim=16)),
}
MOE = tuple(name for name, (_, changes) in CONFIGS.items() if "num_experts_per_tok" in changes)

TEXTS = {"tokenizer.json": '{"version": "1.0"}', "tokenizer_config.json": "{}", "chat_template.jinja": "{{ messages }}"}
"""Tokenizer files that a folder of the zoo gets: enough to be copied."""


def config_of(name: str, **changes: Any) -> PreTrainedConfig:
    kind, own = CONFIGS[name]
    return kind(**SIZES | own | changes)


def save_model(folder: Path, name: str, dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes: Any) -> Path:
    """The folder, as transformers' save_pretrained writes it; every tensor random, norms and biases too."""
    model = AutoModelForCausalLM.from_config(config_of(name, **changes))
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=noise) * 0.2 + 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder
