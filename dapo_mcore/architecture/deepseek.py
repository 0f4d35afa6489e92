"""DeepSeek-V3: multi-head latent attention and bias-corrected, group-limited routing, in Megatron's terms. Pure.

Change here: how keys of DeepSeek-V3's config become Megatron's fields. Multi-token-prediction layers are not built;
transformers does not run them either.
"""

from __future__ import annotations

from typing import Any

from dapo_mcore.errors import ConfigError

KEYS = frozenset(
    {
        *(
            "n_routed_experts",
            "n_shared_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "first_k_dense_replace",
        ),
        *("n_group", "topk_group", "routed_scaling_factor"),
        *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim", "v_head_dim"),
        *("num_nextn_predict_layers", "num_mtp_layers", "ep_size"),
        *("aux_loss_alpha", "seq_aux"),  # DeepSeek's own training loss
    }
)
"""Keys that are read here, or that have no effect."""

REQUIRED: dict[str, tuple[Any, ...]] = {
    "norm_topk_prob": (True,),
    "rope_interleave": (True,),
    "scoring_func": ("sigmoid", None),
    "topk_method": ("noaux_tc", None),
    "moe_layer_freq": (1, None),
}


def megatron_fields(hf: Any) -> dict[str, Any]:
    """Return the MLATransformerConfig fields (megatron-core 0.16.1) that other decoders do not have. Raises ConfigError."""
    return {**_attention(hf), **_rope(hf), **(_routing(hf) if hf.first_k_dense_replace < hf.num_hidden_layers else {})}


def _attention(hf: Any) -> dict[str, Any]:
    if hf.num_key_value_heads != hf.num_attention_heads:
        raise ConfigError(
            f"num_key_value_heads {hf.num_key_value_heads} differs from num_attention_heads {hf.num_attention_heads}, "
            f"but latent attention has as many of both"
        )
    return dict(
        multi_latent_attention=True,
        q_lora_rank=hf.q_lora_rank,
        kv_lora_rank=hf.kv_lora_rank,
        qk_head_dim=hf.qk_nope_head_dim,
        qk_pos_emb_head_dim=hf.qk_rope_head_dim,
        v_head_dim=hf.v_head_dim,
        kv_channels=hf.qk_nope_head_dim + hf.qk_rope_head_dim,
        softmax_scale=None,  # upstream computes it from the head size and YaRN's mscale_all_dim, as transformers does
    )


def _rope(hf: Any) -> dict[str, Any]:
    """Return the rotary embedding's fields. Latent attention rotates a part of each head, with its own embedding in every layer."""
    rope = hf.rope_parameters
    kind = rope["rope_type"]
    if kind == "default":
        return dict(rope_type="rope", rotary_base=rope["rope_theta"], rotary_scaling_factor=1.0)
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    usual = rope.get("truncate", True) and rope.get("attention_factor") is None and (mscale or not all_dim)
    if kind != "yarn" or not usual:
        raise ConfigError(
            f"rope_parameters {rope} are not supported with latent attention; supported are rope_type default, and yarn "
            f"without attention_factor and truncate, and with mscale_all_dim only together with mscale"
        )
    return dict(
        rope_type="yarn",
        rotary_base=rope["rope_theta"],
        rotary_scaling_factor=rope["factor"],
        original_max_position_embeddings=rope["original_max_position_embeddings"],
        beta_fast=rope.get("beta_fast") or 32,
        beta_slow=rope.get("beta_slow") or 1,
        mscale=mscale if all_dim else 1.0,
        mscale_all_dim=all_dim or 0.0,
    )


def _routing(hf: Any) -> dict[str, Any]:
    groups, chosen_groups, chosen = hf.n_group, hf.topk_group, hf.num_experts_per_tok
    limited = chosen_groups < groups
    if limited and chosen != 2 * chosen_groups:
        raise ConfigError(
            f"num_experts_per_tok {chosen} over topk_group {chosen_groups} groups: the model ranks a group by its two best "
            f"experts, megatron-core 0.16.1 by its {chosen} // {chosen_groups} best; supported is twice topk_group"
        )
    return dict(
        moe_router_score_function="sigmoid",
        moe_router_pre_softmax=False,
        moe_router_num_groups=groups if limited else None,
        moe_router_group_topk=chosen_groups if limited else None,
        moe_router_topk_scaling_factor=hf.routed_scaling_factor,
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=0.0,  # training does not balance the experts: the bias stays as loaded
    )
