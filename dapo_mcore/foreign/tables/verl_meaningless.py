"""Settings of verl that change nothing here, each by its name: an unknown one in the same section is a loss, not one of these.

Change here: a setting of verl that means nothing here, and why. `*` stands only for the rest of sections that hold no number of
the objective: profilers, processes, sharding of single workers.
"""

from __future__ import annotations

from dapo_mcore.foreign.table import Rule, meaningless

_A = "actor_rollout_ref.actor"
_R = "actor_rollout_ref.rollout"
_M = "actor_rollout_ref.model"
_REF = "actor_rollout_ref.ref"
_G = f"{_A}.megatron"
_O = f"{_A}.optim"


def _all(place: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{place}.{name}" for name in names)


_SHARDS = ("wrap_policy.min_num_params", "wrap_policy.transformer_layer_cls_to_wrap", "param_offload", "optimizer_offload", "grad_offload",
           "offload_policy", "reshard_after_forward", "fsdp_size", "forward_prefetch", "model_dtype", "use_orig_params", "seed",
           "full_determinism", "ulysses_sequence_parallel_size", "entropy_from_logits_with_chunking", "use_torch_compile",
           "entropy_checkpointing", "forward_only", "strategy", "dtype", "mixed_precision.param_dtype",
           "mixed_precision.reduce_dtype", "mixed_precision.buffer_dtype")  # fmt: skip
_MEGATRON = ("param_offload", "grad_offload", "optimizer_offload", "forward_only", "seed", "use_remove_padding",
             "override_ddp_config", "override_ddp_config.overlap_grad_reduce", "override_ddp_config.grad_reduce_in_fp32",
             "override_ddp_config.overlap_param_gather", "override_ddp_config.bucket_size",
             "override_ddp_config.average_in_collective", "override_ddp_config.check_for_nan_in_grad",
             "override_ddp_config.use_distributed_optimizer",
             "override_ddp_config.num_distributed_optimizer_instances")  # fmt: skip
_FILES = (
    "use_dist_checkpointing",
    "dist_checkpointing_path",
    "dist_checkpointing_prefix",
    "use_mbridge",
    "vanilla_mbridge",
)
_LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
           "context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size", "sequence_parallel",
           "use_distributed_optimizer", "override_transformer_config.*", "override_transformer_config",
           "override_mcore_model_config")  # fmt: skip
_MTP = ("enable_train", "enable_rollout", "detach_encoder", "mtp_loss_scaling_factor", "speculative_algorithm",
        "speculative_num_steps", "speculative_eagle_topk", "speculative_num_draft_tokens", "method", "num_speculative_tokens")  # fmt: skip
_SCORING = ("log_prob_micro_batch_size", "log_prob_micro_batch_size_per_gpu", "log_prob_use_dynamic_bsz",
            "log_prob_max_token_len_per_gpu", "micro_batch_size")  # fmt: skip
_VLLM = ("swap_space", "disable_mm_preprocessor_cache", "mm_processor_cache_gb", "enable_auto_tool_choice", "enable-auto-tool-choice",
         "tool_call_parser", "tool-call-parser", "max_num_seqs", "max-num-seqs", "compilation_config.cudagraph_mode",
         "compilation_config.cudagraph_capture_sizes", "compilation_config.level", "cudagraph_capture_sizes", "async_scheduling",
         "disable_cascade_attn", "enable_expert_parallel", "all2all_backend", "block_size", "disable_custom_all_reduce",
         "distributed_executor_backend", "disable_log_requests", "attention_backend", "use_v2_block_manager")  # fmt: skip
_TURNS = ("max_assistant_turns", "max_user_turns", "max_parallel_calls", "max_tool_response_length", "format", "enable",
          "tool_response_truncate_side", "use_inference_chat_template", "tokenization_sanity_check_mode",
          "num_repeat_rollouts", "tool_config_path", "interaction_config_path", "max_turns")  # fmt: skip

MEANINGLESS: tuple[Rule, ...] = (
    meaningless("sharding and offloading",
                "Megatron shards, and colocated servers take turns with the actor, which waits in host memory",
                *_all(f"{_A}.fsdp_config", *_SHARDS), *_all(f"{_REF}.fsdp_config", *_SHARDS), *_all(_G, *_MEGATRON),
                f"{_A}.fsdp_size", f"{_R}.layered_summon"),
    meaningless("micro-batches", "batch.max_tokens says it, for scoring too",
                *_all(_R, *_SCORING), *_all(_REF, *_SCORING), f"{_A}.use_dynamic_bsz", f"{_A}.ppo_micro_batch_size",
                f"{_A}.ppo_infer_micro_batch_size_per_gpu", f"{_A}.ppo_infer_max_token_len_per_gpu", f"{_A}.micro_batch_size",
                f"{_A}.entropy_from_logits_with_chunking", f"{_A}.entropy_checkpointing"),
    meaningless("the reference model's layout", "it has the policy's",
                *_all(f"{_REF}.megatron", "dtype", *_MEGATRON, *_LAYOUT, *_FILES),
                *_all(_REF, "strategy", "rollout_n", "use_torch_compile", "ulysses_sequence_parallel_size", "param_offload",
                      "entropy_from_logits_with_chunking", "entropy_checkpointing", "use_remove_padding", "use_fused_kernels",
                      "load_weight", "router_replay.mode", "router_replay.record_file", "router_replay.replay_file")),
    meaningless("how weights reach Megatron", "model.path is a Hugging Face folder; it is converted while it is read",
                *_all(_G, *_FILES), f"{_R}.load_format", f"{_M}.use_shm", f"{_R}.layer_name_map.qkv_layer_name",
                f"{_R}.layer_name_map.gate_proj_layer_name", f"{_R}.checkpoint_engine.*", f"{_R}.update_weights_bucket_megabytes"),
    meaningless("kernels", "the kernels here are chosen by themselves",
                *_all(_M, "use_fused_kernels", "fused_kernel_options.impl_backend", "use_liger", "tiled_mlp.enabled",
                      "tiled_mlp.num_shards", "use_remove_padding"),
                *_all(_A, "use_remove_padding", "use_torch_compile", "use_fused_kernels", "use_prefix_grouper")),
    meaningless("the engine's own ways", "servers of SGLang are always asynchronous, return log-probs and give up their memory",
                *_all(_R, "mode", "calculate_log_probs", "free_cache_engine", "enable_sleep_mode", "skip_tokenizer_init",
                      "skip_dump_dir", "multi_stage_wake_up", "disable_log_stats", "max_num_batched_tokens", "prompt_length",
                      "scheduling_policy", "cudagraph_capture_sizes", "sglang_engine_mode", "sglang_rollout_mode",
                      "quantization_config_file", "data_parallel_size", "pipeline_model_parallel_size", "prometheus.*",
                      "trace.token2text", "trace.max_samples_per_step_per_worker", "trace.project_name", "trace.experiment_name",
                      "agent.num_workers", "agent.custom_async_server.name", "server.*", "engine_kwargs.vllm",
                      "engine_kwargs.sglang", "engine_kwargs.trtllm", "engine_kwargs.trtllm.*", "limit_images", "moe_tensor_parallel_size"),
                *_all(f"{_R}.engine_kwargs.vllm", *_VLLM)),
    meaningless("tools that are off, or parts of their configuration", "they go with the tools",
                *_all(f"{_R}.multi_turn", *_TURNS), "data.tool_config_path"),
    meaningless("columns and loading", "rows are read as they are",
                *_all("data", "return_raw_chat", "return_raw_input_ids", "return_full_prompt", "return_multi_modal_inputs",
                      "tokenizer", "use_shm", "dataloader_num_workers", "filter_overlong_prompts_workers", "val_batch_size",
                      "validation_shuffle", "custom_cls.name", "sampler.class_name", "datagen.name",
                      "image_patch_size", "cache_dir")),
    meaningless("the reward's processes", "reward.workers says how many",
                *_all("reward_model", "launch_reward_fn_async", "num_workers", "use_reward_loop", "reward_loop_source",
                      "reward_loop_class_name", "sandbox_fusion.max_concurrent", "sandbox_fusion.memory_limit_mb"),
                *_all("reward", "num_workers", "sandbox_fusion.max_concurrent", "sandbox_fusion.memory_limit_mb"),
                "reward_manager.source", "reward_manager.module.name", "reward.reward_manager.source",
                "reward.reward_manager.module.name"),
    meaningless("parts of a reward model", "reward_model.enable says whether there is one",
                "reward_model.model.*", "reward_model.rollout.*", "reward_model.megatron.*", "reward_model.profiler.*",
                "reward.reward_model.model.*", "reward.reward_model.rollout.*",
                *_all("reward_model", "strategy", "enable_resource_pool", "n_gpus_per_node", "nnodes", "micro_batch_size",
                      "micro_batch_size_per_gpu", "mini_batch_size", "max_length", "use_dynamic_bsz", "forward_max_token_len_per_gpu",
                      "ulysses_sequence_parallel_size", "param_offload", "nccl_timeout", "load_weight"),
                *_all("reward.reward_model", "enable_resource_pool", "n_gpus_per_node", "nnodes", "model_path")),
    meaningless("parts of what is off, or lost with its switch", "they count only with their switch",
                *_all(_M, "lora_alpha", "target_modules", "exclude_modules", "lora.type", "lora.merge", "lora.alpha", "lora.dropout",
                      "lora.target_modules", "lora.exclude_modules", "lora.dropout_position", "lora.lora_A_init_method",
                      "lora.lora_B_init_method", "lora.a2a_experimental", "lora.dtype", "lora.adapter_path", "lora.freeze_*"),
                *_all(f"{_M}.mtp", *_MTP), *_all(f"{_R}.mtp", "enable", *_MTP),
                f"{_R}.mtp", f"{_M}.lora", "algorithm.kl_ctrl.horizon", "algorithm.kl_ctrl.target_kl",
                "algorithm.pf_ppo.reweight_method", "algorithm.pf_ppo.weight_pow", f"{_A}.tau_pos", f"{_A}.tau_neg",
                f"{_A}.calculate_sum_pi_squared", f"{_A}.sum_pi_squared_checkpointing", f"{_A}.router_replay.record_file",
                f"{_A}.router_replay.replay_file", "trainer.rejection_sample_multiplier", f"{_A}.fsdp_config.qat.*", f"{_G}.qat.*", f"{_O}.lr_wsd_decay_style",
                f"{_O}.lr_wsd_decay_steps", f"{_A}.freeze_vision_tower"),
    meaningless("the trainer's own ways", "they have no counterpart, and change no number that is optimised",
                *_all("trainer", "balance_batch", "use_legacy_worker_impl", "del_local_ckpt_after_load",
                      "ray_wait_register_center_timeout", "max_critic_ckpt_to_keep", "esi_redundant_time", "stats_path",
                      "stats_save_freq", "log_freq", "tensorboard_dir", "fixed_eval"),
                "*.overlong_buffer.log", "*.overlong_buffer_cfg.log",
                *_all(_A, "checkpoint.save_contents", "checkpoint.load_contents", "checkpoint.async_save", "checkpoint.contents",
                      "data_loader_seed", "calculate_entropy", "rollout_n"),
                *_all(_O, "total_training_steps", "optimizer_impl", "use_checkpoint_opt_param_scheduler"),
                "ray_kwargs.ray_init.num_cpus", "ray_kwargs.timeline_json_file", "ray_init.num_cpus", "ray_init.timeline_json_file",
                "*.profiler.*", "global_profiler.*", "transfer_queue.*", "hydra.*", "*._target_", "_target_"),
)  # fmt: skip
"""Each under the title that the report gives it."""
