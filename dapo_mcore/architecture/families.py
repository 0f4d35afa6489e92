"""The table of supported model families.

Change here: to add a model. One entry in FAMILIES names its weight rules (weight_rules.py) and the keys of config.json that
only this family has; `megatron_fields` is for what the common decoder in reader.py does not cover (deepseek.py is an
example). Then add its config to tests/actor/families.py and tests/model_files/zoo.py, which compare it with transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dapo_mcore.architecture import deepseek
from dapo_mcore.architecture import weight_rules as rules
from dapo_mcore.architecture.weight_rules import WeightRule
from dapo_mcore.errors import ConfigError


@dataclass(frozen=True)
class Family:
    """How a family differs from the plain Llama-shaped decoder (RMSNorm, RoPE, SwiGLU, no biases).

    attention        weight rules of every layer's attention
    dense            weight rules of a layer with one MLP
    moe              weight rules of a layer with experts
    keys             further keys of config.json that this project reads, or that have no effect
    required         further keys of config.json, with the values that are supported
    megatron_fields  TransformerConfig fields of a config that reader.py does not fill in. Raises ConfigError
    """

    attention: tuple[WeightRule, ...]
    dense: tuple[WeightRule, ...]
    moe: tuple[WeightRule, ...] = ()
    keys: frozenset[str] = frozenset()
    required: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    megatron_fields: Callable[[Any], dict[str, Any]] = lambda hf_config: {}

    @property
    def has_qkv_bias(self) -> bool:
        """Return True if q, k and v have biases."""
        return rules.QKV_BIAS[0] in self.attention

    @property
    def has_qk_norm(self) -> bool:
        """Return True if each query and key head, or in latent attention each latent vector, has an RMSNorm."""
        return rules.QK_NORM[0] in self.attention or self.attention is rules.LATENT_ATTENTION

    @property
    def has_shared_gate(self) -> bool:
        """Return True if a gate scales the shared expert's output."""
        return rules.SHARED_GATE[0] in self.moe


_QWEN_MOE_KEYS = frozenset(
    {
        *("num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob", "qkv_bias"),
        *("moe_intermediate_size", "shared_expert_intermediate_size", "decoder_sparse_step", "mlp_only_layers"),
    }
)

FAMILIES = {
    "Qwen2ForCausalLM": Family(rules.ATTENTION + rules.QKV_BIAS, rules.DENSE),
    "Qwen3ForCausalLM": Family(rules.ATTENTION + rules.QK_NORM, rules.DENSE),
    "LlamaForCausalLM": Family(rules.ATTENTION, rules.DENSE),
    "MistralForCausalLM": Family(rules.ATTENTION, rules.DENSE),
    "MixtralForCausalLM": Family(
        rules.ATTENTION,
        dense=(),
        moe=rules.MIXTRAL_EXPERTS,
        keys=frozenset({"num_local_experts", "num_experts_per_tok"}),
    ),
    "Qwen2MoeForCausalLM": Family(
        rules.ATTENTION + rules.QKV_BIAS,
        rules.DENSE,
        moe=rules.QWEN_EXPERTS + rules.QWEN_SHARED_EXPERT + rules.SHARED_GATE,
        keys=_QWEN_MOE_KEYS,
    ),
    "Qwen3MoeForCausalLM": Family(
        rules.ATTENTION + rules.QK_NORM,
        rules.DENSE,
        moe=rules.QWEN_EXPERTS,
        keys=_QWEN_MOE_KEYS,
        # Qwen3-Coder's config.json states what its class does anyway
        required={"use_qk_norm": (True,), "qkv_bias": (False,), "shared_expert_intermediate_size": (0, None)},
    ),
    "DeepseekV3ForCausalLM": Family(
        rules.LATENT_ATTENTION,
        rules.DENSE,
        moe=rules.QWEN_EXPERTS + rules.DEEPSEEK_SHARED_EXPERT + rules.EXPERT_BIAS,
        keys=deepseek.KEYS,
        required=deepseek.REQUIRED,
        megatron_fields=deepseek.megatron_fields,
    ),
}


def architecture_name(hf_config: Any) -> str:
    """Return the key in FAMILIES of a transformers config. Raises ConfigError for an unsupported architecture.

    A config made in code may have no `architectures`: then its class decides.
    """
    named = (getattr(hf_config, "architectures", None) or [type(hf_config).__name__])[0]
    name = named.removesuffix("Config") + "ForCausalLM" if named.endswith("Config") else named
    if name not in FAMILIES:
        raise ConfigError(f"architecture {named} is not supported; supported are {', '.join(FAMILIES)}")
    return name
