"""The fields of Megatron's TransformerConfig that a run may set in its `megatron` section, and why not the others.

Change here: after reading a new megatron-core version, or when this project starts to support a field. A field that would
have no effect is refused, because whoever sets it expects one. The lists are from megatron-core 0.16.1 and 0.19.2.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dapo_mcore.errors import ConfigError


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


OWNED = _names("""
    activation_func add_bias_linear add_qkv_bias apply_rope_fusion attention_dropout attention_softmax_in_fp32
    batch_p2p_comm beta_fast beta_slow bf16 bias_activation_fusion bias_dropout_fusion calculate_per_token_loss
    context_parallel_size expert_model_parallel_size expert_tensor_parallel_size ffn_hidden_size gated_linear_unit
    gradient_accumulation_fusion hidden_dropout hidden_size kv_channels kv_lora_rank layernorm_epsilon
    masked_softmax_fusion moe_ffn_hidden_size moe_grouped_gemm moe_layer_freq moe_router_bias_update_rate
    moe_router_enable_expert_bias moe_router_group_topk moe_router_num_groups moe_router_pre_softmax
    moe_router_score_function moe_router_topk moe_router_topk_scaling_factor moe_shared_expert_gate
    moe_shared_expert_intermediate_size mscale mscale_all_dim multi_latent_attention normalization
    num_attention_heads num_layers num_moe_experts num_query_groups original_max_position_embeddings params_dtype
    persist_layer_norm pipeline_dtype pipeline_model_parallel_size q_lora_rank qk_head_dim qk_layernorm
    qk_pos_emb_head_dim rope_type rotary_base rotary_scaling_factor sequence_parallel softmax_scale
    tensor_model_parallel_size transformer_impl use_cpu_initialization v_head_dim variable_seq_lengths
    virtual_pipeline_model_parallel_size overlap_p2p_comm
""")
"""The model, parallel and batch sections decide these."""

EFFECTIVE = _names("""
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split num_layers_in_first_pipeline_stage
    num_layers_in_last_pipeline_stage pipeline_model_parallel_layout
    batch_p2p_sync deallocate_pipeline_outputs num_microbatches_with_partial_activation_checkpoints
    recompute_granularity recompute_method recompute_num_layers distribute_saved_activations
    clone_scatter_output_in_embedding config_logger_dir enable_autocast autocast_dtype
    fp32_residual_connection activation_func_clamp_value activation_func_fp8_input_store glu_linear_offset
    attention_output_gate
    no_rope_freq rotary_interleaved
    moe_apply_probs_on_input moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_token_drop_policy
    moe_input_jitter_eps moe_latent_size moe_router_dtype moe_router_force_load_balancing moe_router_force_biased
    moe_shared_expert_overlap moe_token_dispatcher_type moe_flex_dispatcher_backend moe_enable_deepep moe_deepep_num_sms
    moe_hybridep_num_sms mlp_chunks_for_training
""")
"""These have an effect with every kind of layers."""

ENGINE_ONLY = _names("""
    fp4 fp4_recipe fp4_param fp4_quantizer_factory
    disable_parameter_transpose_cache quant_recipe
    symmetric_ar_type
    apply_query_key_layer_scaling attention_backend cp_comm_type softmax_type window_size window_attn_skip_freq
    layernorm_zero_centered_gamma use_te_activation_func fused_single_qkv_rope fused_residual_rmsnorm
    moe_permute_fusion moe_router_fusion flash_attention_version
    cpu_offloading cpu_offloading_num_layers cpu_offloading_activations cpu_offloading_weights
    cpu_offloading_double_buffering cpu_offloading_retain_pinned_cpu_buffers
    fine_grained_activation_offloading offload_modules min_offloaded_tensor_size activation_offload_fraction
    delta_offload_bytes_across_pp_ranks fine_grained_offloading_max_inflight_offloads
""")
"""These have an effect with Transformer Engine's layers only; the local layers do not read them."""

REFUSED = {
    "weights come from model.path or model.init": _names("""
        init_method output_layer_init_method init_method_std embedding_init_method embedding_init_method_std
        perform_initialization init_model_with_meta_device use_mup mup_attn_scale_power mup_base_head_dim
        mup_base_hidden_size mup_embedding_mult mup_output_mult mup_width_mult
    """),
    "model.dtype decides it": _names("fp16"),
    "the section model.fp8 decides it, for instance model.fp8.recipe=blockwise": _names("""
        fp8 fp8_recipe fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad
        fp8_dot_product_attention fp8_multi_head_attention fp8_output_proj fp8_quantizer_factory tp_only_amax_red
        first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16
        moe_router_padding_for_fp8 moe_router_padding_for_quantization
    """),
    "model.routing_replay decides it": _names("moe_enable_routing_replay"),
    "weights stay in model.dtype: exports, syncs and checkpoints would get FP8 parameters back rounded": _names(
        "fp8_param"
    ),
    "model.recompute decides it, for instance model.recompute=[mlp]": _names("recompute_modules moe_layer_recompute"),
    "the layers are those of the model's config.json": _names("""
        heterogeneous_block_specs hetereogenous_dist_checkpoint experimental_attention_variant linear_attention_freq
        linear_conv_kernel_dim linear_key_head_dim linear_num_key_heads linear_num_value_heads linear_value_head_dim
        is_hybrid_model mamba_head_dim mamba_num_groups mamba_num_heads mamba_state_dim mamba_training_ssm_states_dtype
        use_mamba_mem_eff_path dsa_indexer_head_dim dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32
        dsa_indexer_loss_coeff dsa_indexer_n_heads dsa_indexer_rope_interleaved dsa_indexer_rotate_activation
        dsa_indexer_scoring_relu dsa_indexer_skip_topk_offset dsa_indexer_topk dsa_indexer_topk_freq
        dsa_indexer_use_sparse_loss dsa_kernel_backend qk_l2_norm mrope_section rotary_percent use_fused_weighted_squared_relu
        moe_router_topk_limited_devices apply_residual_connection_post_layernorm
        mla_down_proj_fusion
    """),
    "multi-token-prediction layers are not built": _names("""
        mtp_num_layers mtp_loss_scaling_factor mtp_standalone mtp_detach_heads mtp_grad_scale_func
        mtp_hybrid_override_pattern mtp_use_repeated_layer
    """),
    "the policy head makes loss and logits itself": _names("""
        cross_entropy_loss_fusion cross_entropy_fusion_impl defer_embedding_wgrad_compute wgrad_deferral_limit
    """),
    "rollouts are the engine's: Megatron generates nothing here": _names("""
        cache_mla_latents flash_decode inference_rng_tracker inference_sampling_seed inference_fuse_tp_communication
        inference_cuda_graph_scope inference_disable_triton_nvls_kernels inference_grouped_gemm_backend
        inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type mlp_chunks_for_prefill
        nccl_all_reduce_for_prefill use_inference_optimized_layers moe_pad_experts_for_cuda_graph_inference
        batch_invariant_mode
    """),
    "micro-batches have their own lengths, and CUDA graphs need fixed ones": _names("""
        cuda_graph_impl cuda_graph_scope cuda_graph_modules cuda_graph_warmup_steps cuda_graph_use_single_mempool
        cuda_graph_retain_backward_graph enable_cuda_graph external_cuda_graph delay_offload_until_cuda_graph
    """),
    "micro-batches have their own lengths, and each would have to fill Transformer Engine's communication buffers, whose shape is "
    "set once, to the last token": _names("""
        tp_comm_overlap tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs
        tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_atomic_ag tp_comm_split_rs tp_comm_atomic_rs
        tp_comm_overlap_disable_qkv tp_comm_overlap_disable_fc1 tp_comm_bootstrap_backend
    """),
    "the key `deterministic` decides it, with all else that it needs": _names("deterministic_mode"),
    "only Megatron's own training loop reads it": _names("""
        timers barrier_with_L1_time test_mode use_te_rng_tracker disable_bf16_reduced_precision_matmul
        hierarchical_context_parallel_sizes hybrid_context_parallel max_seqlen_per_dp_cp_rank
        pipeline_model_parallel_comm_backend moe_per_layer_logging log_max_attention_logit
        qk_clip qk_clip_alpha qk_clip_threshold
    """),
    "it holds a Python object, which only code can set": _names("""
        _cpu_offloading_context finalize_model_grads_func grad_scale_func grad_sync_func no_sync_func param_sync_func
        moe_grad_scale_func experimental_attention_variant_loss_scale_func
    """),
    "this project does not support such a schedule": _names("""
        overlap_p2p_comm_warmup_flush microbatch_group_size_per_vp_stage use_ring_exchange_p2p
        overlap_moe_expert_parallel_comm delay_wgrad_compute ep_overlap_early_attn_memory_release
        overlap_dispatch_backward_with_experts_wgrad high_priority_a2a_comm_stream
    """),
    "megatron-core does not read it any more": _names("""
        async_tensor_model_parallel_allreduce moe_extended_tp moe_use_legacy_grouped_gemm moe_token_dropping
    """),
    "it belongs to a part of megatron-core, or a package, that this project does not use": _names("""
        use_kitchen use_kitchen_attention kitchen_attention_backend memory_efficient_layer_norm
        gtp_weight_remat_size expert_gtp_weight_remat_size tensor_parallel_num_weight_shards
        expert_tensor_parallel_num_weight_shards moe_paged_stash moe_paged_stash_buffer_size_factor_cpu
        moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_page_size moe_expert_rank_capacity_factor
        moe_flex_dispatcher_num_sms moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute
        moe_hybridep_num_sms_preprocessing moe_hybridep_pad_uneven_dispatch_inputs moe_permute_fusion_into_hybridep
        moe_ncclep_static_shape moe_ncclep_zero_copy moe_mlp_glu_interleave_size moe_shared_expert_glu_interleave_size
        moe_single_grouped_bias moe_single_grouped_weight moe_router_quantile_balancing_ema
        use_grouped_gemm_for_dense_mlp use_grouped_gemm_for_shared_expert use_transformer_engine_op_fuser
    """),
    "its weight would depend on the packing; set model.moe_aux_loss_coef, whose loss does not": _names(
        "moe_aux_loss_coeff moe_router_load_balancing_type"
    ),
    "its weight would depend on the packing: Megatron multiplies it by the tokens of each micro-batch and divides it by "
    "nothing": _names("moe_z_loss_coeff"),
}
"""By reason: fields that a run cannot set, with any layers."""

_SOURCES = ("model_parallel_config.py", "transformer/transformer_config.py")
_CLASSES = ("ModelParallelConfig", "TransformerConfig", "MLATransformerConfig")


def check_fields(section: Mapping[str, Any], *, engine: bool, owned: Mapping[str, Any] | None = None) -> None:
    """Raise ConfigError for a key of the `megatron` section that does not exist, that other sections decide, or that has no
    effect.

    engine  True if the layers are Transformer Engine's (layers.uses_transformer_engine)
    owned   the values that other sections have decided, if known already
    Reads megatron-core's source instead of importing it: no torch, no CUDA, a third of a second.
    """
    known = known_fields() if section else ()
    for key, value in section.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"megatron.{key} is not a field of megatron-core's TransformerConfig{hint}")
        if problem := _problem(key, engine, owned or {}):
            raise ConfigError(f"megatron.{key} {value!r} {problem}")


def _problem(key: str, engine: bool, owned: Mapping[str, Any]) -> str | None:
    """Return why the field cannot be set, or None if it can."""
    for reason, names in REFUSED.items():
        if key in names:
            return f"is refused: {reason}; leave it out"
    if key in owned or key in OWNED:
        here = f" (here {owned[key]!r})" if key in owned else ""
        return f"is decided by the model, parallel and batch sections{here}; set it there"
    if key in EFFECTIVE or (engine and key in ENGINE_ONLY):
        return None
    if key in ENGINE_ONLY:
        return (
            "would change nothing: only Transformer Engine's layers read it, and this run has local ones; leave it out, or "
            "install the extra `te` on a GPU machine"
        )
    return (
        "is not known to have an effect in this project; leave it out, or extend actor/model/megatron_fields.py once you have "
        "seen what it changes"
    )


def known_fields() -> frozenset[str]:
    """Return the fields of all configuration classes of the installed megatron-core, read from its source."""
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None and spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0])
    trees = [ast.parse((folder / name).read_text(encoding="utf-8")) for name in _SOURCES]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef) and node.name in _CLASSES]
    fields = [entry.target for node in classes for entry in node.body if isinstance(entry, ast.AnnAssign)]
    return frozenset(target.id for target in fields if isinstance(target, ast.Name))
