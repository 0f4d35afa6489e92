"""The sizes of a model's weights, read from its Hugging Face config.

Change here: which keys of config.json the sizes come from. reader.py reads everything else (RoPE, routing, norms) and
refuses unknown keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dapo_mcore.architecture.families import FAMILIES, Family, architecture_name
from dapo_mcore.errors import ConfigError


@dataclass(frozen=True)
class WeightShape:
    """The sizes of the whole model's weights, before tensor parallelism splits them.

    moe_layers               one entry per layer: True if it has experts
    expert_ffn, shared_ffn   inner sizes of one expert and of the shared expert; 0 if there is none
    query_rank, key_rank     sizes of the latent vectors in latent attention. key_rank is 0 without latent attention;
                             query_rank is 0 if queries have no latent vector
    rope_dim, value_dim      sizes per head, in latent attention; head_dim includes rope_dim
    """

    architecture: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    padded_vocab_size: int
    tied: bool
    num_experts: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    moe_layers: tuple[bool, ...] = ()
    query_rank: int = 0
    key_rank: int = 0
    rope_dim: int = 0
    value_dim: int = 0

    @property
    def family(self) -> Family:
        return FAMILIES[self.architecture]

    @property
    def has_shared_gate(self) -> bool:
        """Return True if a gate scales the shared expert's output."""
        return self.shared_ffn > 0 and self.family.has_shared_gate

    @property
    def layers_are_alike(self) -> bool:
        """Return True if Megatron's checkpoints stack all layers along one axis: all are dense, or all have experts."""
        return len(set(self.moe_layers)) == 1

    def size(self, name: str) -> int:
        """Return the size that a name in WeightRule.sizes stands for; `vocab` is without padding."""
        return {
            "hidden": self.hidden_size,
            "ffn": self.ffn_size,
            "query": self.num_heads * self.head_dim,
            "key": self.num_kv_heads * self.head_dim,
            "head": self.head_dim,
            "vocab": self.vocab_size,
            "experts": self.num_experts,
            "expert_ffn": self.expert_ffn,
            "shared_ffn": self.shared_ffn,
            "one": 1,
            "whole_query": 0 if self.query_rank else self.num_heads * self.head_dim,
            "query_rank": self.query_rank,
            "key_rank": self.key_rank,
            "latent_key": self.key_rank + self.rope_dim,
            "key_and_value": self.num_heads * (self.head_dim - self.rope_dim + self.value_dim),
            "value": self.num_heads * self.value_dim,
        }[name]


def weight_shape(hf_config: Any, tensor_parallel: int) -> WeightShape:
    """Return the sizes that a transformers config implies. Raises ConfigError for an unsupported architecture."""
    architecture = architecture_name(hf_config)
    _refuse_other_tensors(hf_config, architecture)
    heads = hf_config.num_attention_heads
    kv_heads = _first(hf_config, "num_key_value_heads") or heads
    if heads % kv_heads:
        raise ConfigError(f"num_key_value_heads {kv_heads} does not divide num_attention_heads {heads} in config.json")
    count = _first(hf_config, "num_experts", "num_local_experts", "n_routed_experts")
    num_experts = count if FAMILIES[architecture].moe else 0
    return WeightShape(
        architecture=architecture,
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        ffn_size=hf_config.intermediate_size,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_head_dim(hf_config),
        vocab_size=hf_config.vocab_size,
        padded_vocab_size=padded_vocab_size(hf_config.vocab_size, tensor_parallel),
        tied=hf_config.tie_word_embeddings,
        num_experts=num_experts,
        expert_ffn=(_first(hf_config, "moe_intermediate_size") or hf_config.intermediate_size) if num_experts else 0,
        shared_ffn=_shared_ffn(hf_config),
        moe_layers=tuple(_has_experts(hf_config, layer, num_experts) for layer in range(hf_config.num_hidden_layers)),
        query_rank=_first(hf_config, "q_lora_rank") or 0,
        key_rank=_first(hf_config, "kv_lora_rank") or 0,
        rope_dim=_first(hf_config, "qk_rope_head_dim") or 0,
        value_dim=_first(hf_config, "v_head_dim") or 0,
    )


def padded_vocab_size(vocab_size: int, tensor_parallel: int, align: int = 8) -> int:
    """Return the vocabulary size, rounded up so that each tensor-parallel shard is a multiple of `align` (tensor-core tiles)."""
    unit = tensor_parallel * align
    return -(-vocab_size // unit) * unit


def _refuse_other_tensors(hf_config: Any, architecture: str) -> None:
    """Raise ConfigError for settings that add or drop tensors for which the family has no weight rule."""
    if getattr(hf_config, "attention_bias", False):
        raise ConfigError(f"attention_bias true is not supported: {architecture}'s o_proj.bias has no weight rule")
    if getattr(hf_config, "mlp_bias", False):
        raise ConfigError(f"mlp_bias true is not supported: {architecture}'s MLP biases have no weight rule")
    if FAMILIES[architecture].has_qkv_bias and not getattr(hf_config, "qkv_bias", True):
        raise ConfigError(
            f"qkv_bias false is not supported for {architecture}: its weight rules expect q, k and v biases"
        )


def _head_dim(hf_config: Any) -> int:
    """Return the size per head of queries and keys. Latent attention rotates only a part of it, which its config calls head_dim."""
    if plain := _first(hf_config, "qk_nope_head_dim"):
        return plain + hf_config.qk_rope_head_dim
    return _first(hf_config, "head_dim") or hf_config.hidden_size // hf_config.num_attention_heads


def _shared_ffn(hf_config: Any) -> int:
    if count := _first(hf_config, "n_shared_experts"):
        return count * hf_config.moe_intermediate_size
    return _first(hf_config, "shared_expert_intermediate_size") or 0


def _has_experts(hf_config: Any, layer: int, num_experts: int) -> bool:
    """Return True if the layer has experts.

    Source: transformers' Qwen2MoeDecoderLayer, Qwen3MoeDecoderLayer, DeepseekV3DecoderLayer; Mixtral has no such keys.
    """
    step = getattr(hf_config, "decoder_sparse_step", 1)
    dense = getattr(hf_config, "mlp_only_layers", None) or range(getattr(hf_config, "first_k_dense_replace", 0))
    return num_experts > 0 and layer not in dense and (layer + 1) % step == 0


def _first(hf_config: Any, *names: str) -> Any:
    """Return the first of these settings that the config has and that is not null, else None."""
    return next((value for name in names if (value := getattr(hf_config, name, None)) is not None), None)
