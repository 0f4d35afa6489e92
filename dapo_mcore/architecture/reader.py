"""From a Hugging Face config to the fields of Megatron's config. Pure. Every key of config.json is accounted for.

Change here: to support a key that any family may have; a new family goes into families.py. Each key is read, required to
have a supported value, known to have no effect, or at its class's default. Any other key is refused by name, never guessed.
A key means what transformers' class makes of it. A key that the class ignores is refused too: somebody set it for a reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dapo_mcore.architecture.families import FAMILIES, Family, architecture_name
from dapo_mcore.architecture.rope import Rope, read_rope
from dapo_mcore.architecture.shape import WeightShape, weight_shape
from dapo_mcore.errors import ConfigError

_READ = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings"),
    *("rope_parameters", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
}

_REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "router_jitter_noise": (0, None),
    "partial_rotary_factor": (1, None),
    "use_mrope": (False, None),
    "rope_interleaved": (False, None),
}
"""Keys with the values that are supported. Megatron cannot follow other values here, or not reproducibly."""

_NO_EFFECT = {
    *("architectures", "model_type", "auto_map", "_name_or_path", "transformers_version", "torch_dtype", "dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "initializer_range", "id2label", "label2id"),
    *("return_dict", "output_hidden_states", "output_attentions", "_attn_implementation"),
    *("output_router_logits", "router_aux_loss_coef"),  # only Hugging Face's own training loss reads them
    "pretraining_tp",  # once split the matrix products in transformers, without changing their result
    *("unsloth_fixed", "unsloth_version", "is_llama_config", "transformers.js_config"),
}

_QUANTIZED = (
    "quantization_config in config.json says that the weights are quantized, which cannot be trained; take the model's bf16 "
    "weights, or dequantize these (transformers: from_pretrained(…, dequantize=True in its quantization config), then "
    "save_pretrained) and remove the key"
)


@dataclass(frozen=True)
class Architecture:
    """The model that a Hugging Face config describes.

    name            key in families.FAMILIES
    fields          TransformerConfig fields (megatron-core 0.16.1) that the model decides
    rope            the rotary embedding
    vocab_size      rows of the embedding, unpadded
    max_positions   the longest sequence, in tokens, that the model was made for
    tied            True if the output projection is the embedding
    """

    name: str
    fields: dict[str, Any]
    rope: Rope
    vocab_size: int
    max_positions: int
    tied: bool

    @property
    def num_layers(self) -> int:
        return self.fields["num_layers"]

    @property
    def num_experts(self) -> int | None:
        return self.fields.get("num_moe_experts")

    @property
    def latent_attention(self) -> bool:
        return self.fields.get("multi_latent_attention", False)


def read_architecture(hf_config: Any, longest_sequence: int) -> Architecture:
    """Return the architecture that a transformers config describes.

    longest_sequence  tokens of the longest training sequence; a sliding window at least as wide has no effect
    Raises ConfigError, naming the key, for every key that is not understood.
    """
    name = architecture_name(hf_config)
    family = FAMILIES[name]
    _refuse_unknown_keys(hf_config, name, family)
    _refuse_narrow_window(hf_config, longest_sequence)
    rope, shape = read_rope(hf_config), weight_shape(hf_config, tensor_parallel=1)
    return Architecture(
        name=name,
        fields=_decoder(hf_config, family, rope, shape)
        | _experts(hf_config, family, shape)
        | family.megatron_fields(hf_config),
        rope=rope,
        vocab_size=shape.vocab_size,
        max_positions=hf_config.max_position_embeddings,
        tied=shape.tied,
    )


def _decoder(hf: Any, family: Family, rope: Rope, shape: WeightShape) -> dict[str, Any]:
    return dict(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        # YaRN scales queries and keys by the same factor; megatron-core can apply it only as part of softmax_scale
        softmax_scale=rope.attention_factor**2 / shape.head_dim**0.5,
        normalization="RMSNorm",
        layernorm_epsilon=hf.rms_norm_eps,
        qk_layernorm=family.has_qk_norm,
        add_bias_linear=False,
        add_qkv_bias=family.has_qkv_bias,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )


def _experts(hf: Any, family: Family, shape: WeightShape) -> dict[str, Any]:
    if not any(shape.moe_layers):
        return {}
    chosen = hf.num_experts_per_tok
    normalized = hf.norm_topk_prob if "norm_topk_prob" in family.keys else True
    if chosen == 1 and normalized:
        raise ConfigError(
            "num_experts_per_tok 1 with normalized probabilities gives every expert the weight 1, and megatron-core "
            "0.16.1 cannot do that; set norm_topk_prob false in config.json if the model allows"
        )
    return dict(
        num_moe_experts=shape.num_experts,
        moe_ffn_hidden_size=shape.expert_ffn,
        moe_layer_freq=1 if all(shape.moe_layers) else [int(has_experts) for has_experts in shape.moe_layers],
        moe_router_topk=chosen,
        moe_router_score_function="softmax",
        # a softmax over all experts, normalised over the chosen ones, equals a softmax over the chosen ones
        moe_router_pre_softmax=not normalized,
        moe_shared_expert_intermediate_size=shape.shared_ffn or None,
        moe_shared_expert_gate=shape.has_shared_gate,
    )


def _refuse_unknown_keys(hf: Any, name: str, family: Family) -> None:
    """Raise ConfigError, naming every key that is unknown or has an unsupported value."""
    understood, required = _READ | _NO_EFFECT | family.keys, _REQUIRED | family.required
    settings, defaults = hf.to_dict(), type(hf)().to_dict()
    problems = [_QUANTIZED] if settings.pop("quantization_config", None) is not None else []
    problems += [
        f"{key} {_short(settings[key])} in config.json is not supported for {name}; supported is {values[0]!r}"
        for key, values in required.items()
        if key in settings and settings[key] not in values
    ]
    unknown = [
        f"{key} {_short(value)}"
        for key, value in settings.items()
        if key not in understood | required.keys()
        and value is not None
        and (key not in defaults or value != defaults[key])
    ]
    if unknown:
        problems.append(
            f"{', '.join(unknown)} in config.json {'is' if len(unknown) == 1 else 'are'} not understood for {name}: it may "
            f"change what the model computes; remove what does not, and compare logits with transformers"
        )
    if problems:
        raise ConfigError("; ".join(problems))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


def _refuse_narrow_window(hf: Any, longest_sequence: int) -> None:
    """Raise ConfigError if a sliding window is narrower than the longest training sequence."""
    kinds = set(getattr(hf, "layer_types", None) or ())
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise ConfigError(f"layer_types has {', '.join(sorted(unknown))}; supported is full_attention")
    window = getattr(hf, "sliding_window", None)
    slides = "sliding_attention" in kinds if kinds else getattr(hf, "use_sliding_window", True)
    if slides and window and window < longest_sequence:
        raise ConfigError(
            f"sliding_window {window} is narrower than the longest training sequence, {longest_sequence} tokens "
            f"(data.max_prompt_tokens + rollout.max_response_tokens), and sliding attention is not supported; "
            f"shorten the sequences to at most {window} tokens"
        )
