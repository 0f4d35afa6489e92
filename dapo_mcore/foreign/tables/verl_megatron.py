"""Rules of verl's table about Megatron's TransformerConfig, which verl overrides field by field.

Change here: a field that another section decides here, or that the section `megatron` takes. The latter's own list, with the reason
why it takes no other, is in actor/model/megatron_fields.py; a test holds that it takes what this module hands on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dapo_mcore.foreign.table import Outcome, Source, gone

_MEGATRON = "actor_rollout_ref.actor.megatron"
_PLACE = f"{_MEGATRON}.override_transformer_config"
_RECOMPUTE = ("recompute_granularity", "recompute_modules", "recompute_method", "recompute_num_layers")
_FP8 = ("fp8", "fp8_recipe", "first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
_RECIPES = {"blockwise": "blockwise", "tensorwise": "tensorwise", "mxfp8": "mxfp8"}
_DEFAULTS = {"attention_backend": "flash", "moe_permute_fusion": False, "attention_dropout": 0, "hidden_dropout": 0,
             "moe_aux_loss_coeff": 0, "moe_z_loss_coeff": 0, "moe_router_load_balancing_type": "none", "fp8": None,
             "deterministic_mode": False, "fp16": False, "mtp_num_layers": 0, "moe_layer_recompute": False}  # fmt: skip
"""Values that change nothing here."""
_LAYOUT = frozenset(
    [
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "sequence_parallel",
    ]
)
_KERNELS = frozenset(
    [
        "apply_rope_fusion",
        "bias_activation_fusion",
        "bias_dropout_fusion",
        "masked_softmax_fusion",
        "gradient_accumulation_fusion",
        "persist_layer_norm",
        "moe_grouped_gemm",
        "use_flash_attn",
        "use_arbitrary_attention_mask",
        "variable_seq_lengths",
        "batch_p2p_comm",
        "overlap_p2p_comm",
        "cross_entropy_loss_fusion",
        "cross_entropy_fusion_impl",
        "defer_embedding_wgrad_compute",
        "tp_comm_overlap",
        "enable_cuda_graph",
        "external_cuda_graph",
        "cuda_graph_impl",
        "cuda_graph_scope",
        "transformer_impl",
        "use_cpu_initialization",
        "bf16",
        "params_dtype",
        "pipeline_dtype",
        "attention_softmax_in_fp32",
        "use_te_rng_tracker",
        "delay_wgrad_compute",
        "overlap_moe_expert_parallel_comm",
        "moe_use_legacy_grouped_gemm",
    ]
)
"""Fields that say how something is computed, which is decided here by the model, the device and the batch."""
HANDED_ON = frozenset(
    [
        "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split",
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
        "pipeline_model_parallel_layout",
        "batch_p2p_sync",
        "deallocate_pipeline_outputs",
        "distribute_saved_activations",
        "fp32_residual_connection",
        "activation_func_clamp_value",
        "attention_backend",
        "cp_comm_type",
        "moe_apply_probs_on_input",
        "moe_expert_capacity_factor",
        "moe_pad_expert_input_to_capacity",
        "moe_token_drop_policy",
        "moe_input_jitter_eps",
        "moe_router_dtype",
        "moe_router_force_load_balancing",
        "moe_shared_expert_overlap",
        "moe_token_dispatcher_type",
        "moe_flex_dispatcher_backend",
        "moe_enable_deepep",
        "moe_deepep_num_sms",
        "moe_hybridep_num_sms",
        "moe_permute_fusion",
        "moe_router_fusion",
        "fused_single_qkv_rope",
        "fused_residual_rmsnorm",
        "apply_query_key_layer_scaling",
        "layernorm_zero_centered_gamma",
        "window_size",
        "softmax_type",
        "cpu_offloading",
        "cpu_offloading_num_layers",
    ]
)
"""Fields that stand in the section `megatron` under their own names."""


def transformer_config(source: Source) -> Iterator[Outcome]:
    """Yield what becomes of each overridden field; one that nothing here takes is lost."""
    whole = source[_PLACE] if isinstance(source[_PLACE], dict) else {}
    given = {**whole, **source.below(_PLACE)}
    keys = {name: f"{_PLACE}.{name}" if source.gives(f"{_PLACE}.{name}") else _PLACE for name in given}
    for name, value in given.items():
        if name not in (*_RECOMPUTE, *_FP8) or _changes_nothing(name, value):
            yield from _field(source, name, value, keys[name])
    if given.get("recompute_granularity") is not None:
        used = tuple(keys[name] for name in _RECOMPUTE if name in given)
        yield Outcome("converted", used, "model.recompute", _recompute(given), "full: every layer by itself")
    if given.get("fp8"):
        yield from _fp8(given, keys)


def _changes_nothing(name: str, value: Any) -> bool:
    return name in _DEFAULTS and (value == _DEFAULTS[name] or (value is None and not _DEFAULTS[name]))


def _field(source: Source, name: str, value: Any, key: str) -> Iterator[Outcome]:
    if _changes_nothing(name, value):
        yield Outcome("meaningless", (key,), note="the default here, too")
    elif name in HANDED_ON:
        yield Outcome("converted", (key,), "megatron", {name: value}, "Megatron's field")
    elif name in _KERNELS:
        yield Outcome("meaningless", (key,), note="decided here by the model, the device and the batch")
    elif name in _LAYOUT and value == source[f"{_MEGATRON}.{name}"]:
        yield Outcome("meaningless", (key,), note=f"the same as megatron.{name}")
    elif name in _LAYOUT or name == "moe_layer_recompute":
        yield gone(f"{name} {value} is not taken from there; nearest: the sections parallel and model", key)
    elif name == "moe_aux_loss_coeff":
        note = "of a loss for the mean sample; Megatron's depends on the packing"
        yield Outcome("converted", (key,), "model.moe_aux_loss_coef", value, note)
    elif name == "moe_router_load_balancing_type":
        yield Outcome(
            "meaningless",
            (key,),
            note="moe_aux_loss_coeff says whether there is such a loss; here it is of each sample",
        )
    elif name == "deterministic_mode":
        yield Outcome("converted", (key,), "deterministic", True, "with all else that it needs")
    else:
        yield gone(
            f"no field {name} of Megatron's is set here; nearest: the section megatron, or model.overrides",
            key,
            objective=True,
        )


def _recompute(given: dict[str, Any]) -> str | list[str]:
    level, modules = str(given["recompute_granularity"]), given.get("recompute_modules") or ()
    if level != "selective" or not modules:
        return level
    inside = ("moe_act", "shared_experts") if "moe" in modules else ()
    return [name for name in modules if name not in inside]


def _fp8(given: dict[str, Any], keys: dict[str, str]) -> Iterator[Outcome]:
    """Yield model.fp8 from the recipe and the format. Megatron's own default recipe is delayed, which is refused here."""
    recipe = given.get("fp8_recipe", "delayed")
    used = tuple(keys[name] for name in _FP8 if name in given)
    if recipe not in _RECIPES:
        yield gone(f"the recipe {recipe} of FP8; nearest: model.fp8.recipe blockwise", used[0], objective=True)
        return
    value = {"recipe": _RECIPES[recipe], "format": given["fp8"]}
    if given.get("first_last_layers_bf16"):
        value["first_last_bf16"] = max(given.get(f"num_layers_at_{end}_in_bf16", 1) for end in ("start", "end"))
    yield Outcome("converted", used, "model.fp8", value, "products in FP8, with Transformer Engine on GPUs")
