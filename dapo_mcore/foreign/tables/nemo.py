"""NeMo-RL's table: what each of its keys becomes here, as of commit 7ea279a (2026-08-22).

Change here: a key of NeMo-RL. Its name and our key are in config/foreign_names.py, its default in nemo_defaults.py, and what follows
from several keys in nemo_objective.py, nemo_run.py, nemo_data.py and nemo_servers.py. A key that is in no rule counts as lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from dapo_mcore.config.foreign_names import NEMO as NAMES
from dapo_mcore.foreign.table import (
    Outcome,
    Rule,
    Source,
    Table,
    changed,
    combined,
    gone,
    joined,
    lost,
    meaningless,
    run_name,
)
from dapo_mcore.foreign.table import same as _same
from dapo_mcore.foreign.tables import nemo_data as data
from dapo_mcore.foreign.tables import nemo_objective as objective
from dapo_mcore.foreign.tables import nemo_run as run
from dapo_mcore.foreign.tables.nemo_defaults import nemo_defaults
from dapo_mcore.foreign.tables.nemo_servers import servers

same = partial(_same, NAMES)
_G, _M, _L = "policy.generation", "policy.megatron_cfg", "loss_fn"


def _below(prefix: str, names: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}" for name in names.split())


def lost_together(what: str, *keys: str) -> Rule:
    """Return the rule of settings that are one loss of the objective, named and accepted by the first of them that is on."""
    reads = Rule(keys, (), lambda _: ()).reads

    def apply(source: Source) -> Iterator[Outcome]:
        on = [
            setting.key
            for setting in source.run.settings
            if reads(setting.key) and setting.value not in (None, False, {}, [])
        ]
        if on:
            yield gone(what, *on, objective=True)

    return Rule(keys, (), apply, what, objective=True)


_OF_MEGATRON = _below(
    _M,
    """
    enabled env_vars env_vars.* empty_unused_memory_level pipeline_dtype defer_fp32_logits apply_rope_fusion bias_activation_fusion
    force_reconvert_from_hf attention_backend moe_per_layer_logging moe_enable_deepep moe_token_dispatcher_type moe_permute_fusion
    inference_moe_token_dispatcher_type inference_grouped_gemm_backend moe_router_num_groups moe_router_group_topk moe_router_dtype
    moe_router_enable_expert_bias transformer_impl cuda_graph_impl cuda_graph_modules cuda_graph_warmup_steps moe_grouped_gemm
    moe_pad_experts_for_cuda_graph_inference moe_shared_expert_overlap fine_grained_activation_offloading offload_modules
    use_gloo_process_groups moe_flex_dispatcher_backend moe_hybridep_num_sms hybridep_num_ranks_per_nvlink_domain hybridep_use_mnnvl
    distributed_data_parallel_config.* checkpoint.* gradient_accumulation_fusion use_fused_weighted_squared_relu
    use_fused_linear_logprobs fused_linear_logprobs_chunk_size mtp_loss_scaling_factor mtp_use_repeated_layer mtp_detach_heads
    clear_memory_caches_before_refit fp8_cfg.fp8_param fp8_cfg.force_clear_fp8_caches num_layers_in_first_pipeline_stage
    num_layers_in_last_pipeline_stage converter_type track_moe_metrics radio_force_cpe_eval_mode train_iters
    freeze_vision_model freeze_vision_projection freeze_sound_encoder freeze_sound_projection freeze_config.freeze_vision_model
    freeze_config.freeze_vision_projection peft.target_modules peft.exclude_modules peft.dim peft.alpha peft.dropout
    peft.dropout_position peft.lora_A_init_method peft.lora_B_init_method peft.a2a_experimental peft.lora_dtype
    optimizer.bf16 optimizer.fp16 optimizer.params_dtype optimizer.sgd_momentum optimizer.use_distributed_optimizer
    optimizer.use_precision_aware_optimizer optimizer.overlap_cpu_optimizer_d2h_h2d
    scheduler.start_weight_decay scheduler.end_weight_decay scheduler.override_opt_param_scheduler""",
)
_OF_TRAINER = (
    *_below(
        "policy",
        """
        make_sequence_length_divisible_by logprob_batch_size logprob_chunk_size logprob_mb_tokens generation_batch_size
        offload_optimizer_for_logprob optimizer dtensor_cfg tokenizer tokenizer.name tokenizer.use_fastokens refit_buffer_size_gb
        optimizer.kwargs.foreach optimizer.kwargs.fused optimizer.kwargs.exp_avg_dtype optimizer.kwargs.exp_avg_sq_dtype
        optimizer.kwargs.master_weights optimizer.kwargs.store_param_remainders disable_modelopt_layer_spec
        sequence_packing.enabled sequence_packing.logprob_mb_tokens sequence_packing.algorithm sequence_packing.microbatch_order
        sequence_packing.sequence_length_round sequence_packing.fuse_loss dynamic_batching.enabled dynamic_batching.logprob_mb_tokens
        dynamic_batching.sequence_length_round draft.model_name draft.loss_weight draft.num_layers draft.aux_layer_indices
        activation_checkpointing_enabled""",
    ),
    *_below(
        "grpo",
        """
        async_grpo async_grpo.max_generation_failures async_grpo.recompute_kv_cache_after_weight_updates max_rollout_turns
        skip_reference_policy_logprobs_calculation calculate_advantages_on_gpu deduplicate_multimodal_data debug_payload_metrics
        adv_estimator.minus_baseline stop_at_validation_threshold""",
    ),
    f"{_L}.kl_input_clamp_value",
)
_OF_DATA = (
    *_below(
        "data",
        "num_workers num_prompts_per_dataloader default validation validation.seed add_bos add_eos add_generation_prompt add_system_prompt",
    ),
    *_below("data.default", "data_path dataset_name subset split seed split_validation_size"),
    *_below("data.train", "seed download_dir"),
    *_below("data.validation", "download_dir split_validation_size"),
)
_OF_SERVERS = (
    *_below(_G, """
        port_range_low port_range_high use_async_rollouts refit_transport real_quant_export_cpu_offload refit_cfg.*
        mcore_generation_config.* trtllm_cfg.* dynamo_cfg.*"""),
    *_below(f"{_G}.vllm_cfg", """
        async_engine logprobs_mode max_model_len use_tqdm use_deep_gemm num_last_layers_in_bf16 num_first_layers_in_bf16
        enable_vllm_metrics_logger vllm_metrics_logger_interval http_refit_api_key_env_var http_refit_server_port
        zmq_refit_server_port reset_encoder_cache_after_weight_update expert_parallel_size enable_expert_parallel
        enable_prefix_caching load_format skip_tokenizer_init env_vars env_vars.* expose_http_server http_server_serving_chat_kwargs
        http_server_serving_chat_kwargs.* cap_max_tokens_to_context reasoning_parser_plugin quantization_ignored_layer_kws"""),
    *_below("cluster", "master_port_range_low master_port_range_high segment_size"),
    "data_plane", "data_plane.*",
)  # fmt: skip
_OF_LOGGERS = (
    *_below(
        "checkpointing",
        """
        model_save_format save_consolidated save_optimizer checkpoint_must_save_by ft_keep_latest_k ft_save_period model_cache_dir
        model_repo_id is_peft peft_config is_async""",
    ),
    *_below(
        "logger",
        """
        log_dir num_val_samples_to_print monitor_gpus wandb.log_nemo_gym_full_result_tables swanlab.name tensorboard
        tensorboard.log_dir mlflow.run_name mlflow.tracking_uri gpu_monitoring.collection_interval gpu_monitoring.flush_interval""",
    ),
)
_OF_LORA = _below(
    "policy.dtensor_cfg.lora_cfg",
    """
    target_modules exclude_modules match_all_linear dim alpha dropout dropout_position lora_A_init use_triton""",
)
_OF_DTENSOR = _below(
    "policy.dtensor_cfg",
    """
    env_vars.* _v2 dp_replicate_size sequence_parallel
    cpu_offload custom_parallel_plan defer_fsdp_grad_sync moe_parallelizer.* automodel_kwargs automodel_kwargs.use_liger_kernel
    automodel_kwargs.use_sdpa_patching automodel_kwargs.attn_implementation automodel_kwargs.backend.* automodel_kwargs.force_hf
    automodel_kwargs.freeze_config.* clear_cache_every_n_steps activation_checkpointing""",
)

_OLD_NAMES = {
    "data.prompt_file": "data.default.prompt_file", "data.system_prompt_file": "data.default.system_prompt_file",
    "data.dataset_name": "data.train.dataset_name", "data.split": "data.train.split",
}  # fmt: skip
"""Keys that 7ea279a does not read any more, and where they are now."""
_FUSED = "transformer_engine.pytorch.optimizers.fused_adam.FusedAdam"

_RULES = (
    combined(run.length, "num_rollout_steps, num_epochs", "grpo.max_num_steps", "grpo.max_num_epochs"),
    run_name("logger.wandb.name"),
    same("grpo.seed"),
    combined(run.saving, "output_dir, checkpoint.every, checkpoint.keep, checkpoint.keep_best, checkpoint.best_metric, "
             "checkpoint.best_mode", "checkpointing.checkpoint_dir", "checkpointing.enabled", "checkpointing.save_period",
             "checkpointing.keep_top_k", "checkpointing.metric_name", "checkpointing.higher_is_better"),
    combined(run.model, "model.path, model.dtype, model.recompute, model.fp8.recipe, model.fp8.format", "policy.model_name",
             "policy.precision", "policy.dtensor_cfg.activation_checkpointing", *_below(_M, """
             activation_checkpointing recompute_granularity recompute_modules fp8_cfg.enabled fp8_cfg.fp8_recipe fp8_cfg.fp8
             freeze_moe_router moe_router_load_balancing_type moe_router_bias_update_rate""")),
    combined(run.overrides, "model.overrides", "policy.hf_config_overrides", "policy.hf_config_overrides.*"),
    combined(run.layout, "parallel.tensor_parallel, parallel.pipeline_parallel, parallel.context_parallel, parallel.expert_parallel, "
             "parallel.expert_tensor_parallel, parallel.sequence_parallel", *_below(_M, """
             tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size expert_model_parallel_size
             expert_tensor_parallel_size sequence_parallel"""), *run.DTENSOR),
    combined(data.data, "data.files, data.prompt_key, data.answer_key, data.answer_pattern, data.chat_template, data.chat_template_kwargs, "
             "data.prompt_template, data.system_prompt, data.deduplicate", "data.train", "data.custom_dataloader", "data.use_multiple_dataloader",
             "data.default.prompt_file", "data.default.system_prompt_file", "data.default.processor", "data.default.input_key",
             "data.default.output_key", "policy.tokenizer.chat_template", "policy.tokenizer.chat_template_kwargs*", *_below("data.train", """
             data_path dataset_name input_key output_key subset split prompt_file system_prompt_file processor""")),
    same("data.shuffle"),
    combined(data.lengths, "data.max_prompt_tokens, data.on_long_prompt, rollout.max_response_tokens", "data.max_input_seq_length",
             f"{_G}.max_new_tokens", "policy.max_total_sequence_length"),
    same("grpo.num_generations_per_prompt"),
    same(f"{_G}.temperature"),
    same(f"{_G}.top_p"),
    changed(NAMES, lambda k: k if k else -1, f"{_G}.top_k"),
    joined("rollout.stop", "texts and ids in one list", f"{_G}.stop_strings", f"{_G}.stop_token_ids", "env.math.stop_strings"),
    combined(servers, "rollout.engine, rollout.sglang.tensor_parallel, rollout.sglang.num_servers, rollout.sglang.colocated, "
             "rollout.sglang.sync, rollout.sglang.placement, rollout.sglang.host, rollout.sglang.server_args, rollout.sglang.quantize, "
             "rollout.sglang.max_in_flight", f"{_G}.backend", *_below(f"{_G}.vllm_cfg", """
             tensor_parallel_size pipeline_parallel_size gpu_memory_utilization enforce_eager precision kv_cache_dtype"""),
             f"{_G}.colocated.enabled", f"{_G}.colocated.resources.*", f"{_G}.sglang_cfg.*", "cluster.num_nodes", "cluster.gpus_per_node"),
    combined(run.sampling, "sampling.train_batch_prompts, sampling.style, sampling.gen_batch_prompts, sampling.max_gen_batches, "
             "sampling.carry_surplus", "grpo.num_prompts_per_step", "grpo.use_dynamic_sampling", "grpo.batch_multiplier",
             "grpo.dynamic_sampling_max_gen_batches", "grpo.use_leave_one_out_baseline"),
    combined(objective.reward, "reward.function, reward.workers", "data.default.env_name", "data.train.env_name", "data.validation.env_name", "env.math.math_verify_impl", "env.math.num_workers", *_below("grpo.reward_scaling", "enabled source_min source_max target_min target_max")),
    objective.ENVIRONMENTS,
    combined(objective.overlong, "reward.overlong.penalty, reward.overlong.cache, reward.overlong.factor, reward.overlong.max_length, "
             "reward.overlong.filter", *_below("grpo.reward_shaping", """
             enabled overlong_buffer_length overlong_buffer_penalty max_response_length stop_properly_penalty_coef"""), "grpo.overlong_filtering"),
    combined(objective.estimator, "algo.advantage, algo.advantage_std, algo.advantage_baseline", "grpo.adv_estimator.name",
             "grpo.normalize_rewards", "grpo.use_leave_one_out_baseline", "grpo.adv_estimator.normalize_rewards",
             "grpo.adv_estimator.use_leave_one_out_baseline"),
    combined(objective.policy_loss, "algo.policy_loss, algo.clip_low, algo.clip_high, algo.dual_clip, algo.loss_mode", f"{_L}.use_cispo",
             f"{_L}.sequence_level_importance_ratios", f"{_L}.token_level_loss", *_below(_L, "ratio_clip_min ratio_clip_max ratio_clip_c force_on_policy_ratio disable_ppo_ratio"),
             f"{_G}.top_p", f"{_G}.top_k", *objective.LOST_OF_THE_OBJECTIVE),
    combined(objective.kl, "algo.kl.coef, algo.kl.estimator, algo.kl.place", *_below(_L, """
             reference_policy_kl_penalty reference_policy_kl_type use_kl_in_reward kl_output_clamp_value use_on_policy_kl_approximation""")),
    combined(objective.correction, "algo.tis.mode, algo.tis.lower, algo.tis.cap, algo.tis.level, algo.rejection, algo.rejection_divisor, "
             "rollout.async_steps", f"{_L}.use_importance_sampling_correction",
             f"{_L}.truncated_importance_sampling_type", *_below(_L, "truncated_importance_sampling_ratio truncated_importance_sampling_ratio_min"), "grpo.async_grpo.enabled",
             "grpo.async_grpo.max_trajectory_age_steps", "grpo.async_grpo.in_flight_weight_updates"),
    combined(run.batch, "batch.mini_batch_prompts, batch.shuffle, batch.max_tokens", "policy.train_global_batch_size",
             "policy.train_micro_batch_size", "policy.sequence_packing.train_mb_tokens", "policy.dynamic_batching.train_mb_tokens"),
    combined(run.optimizer, "optimizer.lr, optimizer.weight_decay, optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.clip_grad, "
             "optimizer.schedule, optimizer.min_lr, optimizer.warmup_rollout_steps, optimizer.decay_rollout_steps, optimizer.offload_fraction",
             *_below("policy.optimizer.kwargs", "lr weight_decay betas eps"), "policy.scheduler", "policy.scheduler.*", "policy.max_grad_norm",
             *_below(f"{_M}.optimizer", "lr min_lr weight_decay adam_beta1 adam_beta2 adam_eps clip_grad optimizer_cpu_offload optimizer_offload_fraction"),
             *_below(f"{_M}.scheduler", "lr_decay_style lr_decay_iters lr_warmup_iters lr_warmup_init")),
    combined(data.evaluation, "eval.every, eval.at_start, eval.sets, eval.samples_per_prompt, eval.temperature, eval.top_p, eval.top_k",
             *_below("data.validation", """
             data_path dataset_name input_key output_key subset split prompt_file system_prompt_file processor repeat"""),
             "data.validation", "data.train.split_validation_size", *_below("grpo", """
             val_period val_at_start max_val_samples val_batch_size val_num_generations_per_prompt"""),
             *_below(_G, "val_temperature val_top_p val_top_k")),
    combined(run.loggers, "observe.tensorboard, observe.wandb_project, observe.mlflow_experiment, observe.swanlab_project",
             "logger.tensorboard_enabled", "logger.wandb_enabled", "logger.wandb.project", "logger.mlflow_enabled",
             "logger.mlflow.experiment_name", "logger.swanlab_enabled", "logger.swanlab.project"),
    meaningless("of Megatron there", "it holds with megatron_cfg.enabled, or is chosen here by the device", *_OF_MEGATRON),
    meaningless("of the trainer", "they change no number here", *_OF_TRAINER),
    meaningless("of the data", "without a counterpart, or said by the files", *_OF_DATA),
    meaningless("of generation", "of other engines than SGLang, or chosen here by the device", *_OF_SERVERS),
    meaningless("of checkpoints and loggers", "in the run's folder here", *_OF_LOGGERS),
    meaningless("of DTensor (FSDP)", "Megatron trains here", *_OF_DTENSOR),
    meaningless("of LoRA", "lora_cfg.enabled says whether it is on", *_OF_LORA),
    lost("LoRA: all weights train; nearest: full training with lr 1e-6", "policy.dtensor_cfg.lora_cfg.enabled", f"{_M}.peft.enabled",
         objective=True),
    lost("an option of vLLM or TensorRT; nearest: SGLang's own in rollout.sglang.server_args", f"{_G}.vllm_kwargs", f"{_G}.vllm_kwargs.*",
         f"{_G}.trtllm_kwargs.*", off=(None, False, {})),
    lost("words may be drawn that are forbidden there", f"{_G}.bad_words", off=(None, []), objective=True),
    lost("the optimizer is AdamW", "policy.optimizer.name", off=(None, "torch.optim.AdamW", _FUSED)),
    lost("the optimizer is AdamW", f"{_M}.optimizer.optimizer", off=(None, "adam")),
    lost("weight decay stays as it begins", f"{_M}.scheduler.weight_decay_incr_style", off=(None, "constant")),
    lost("fields of Megatron's model; nearest: section megatron", f"{_M}.model_overrides", f"{_M}.model_overrides.*", off=(None, {}), objective=True),
    lost("heads that predict further tokens are not trained", f"{_M}.mtp_num_layers", off=(None, 0)),
    lost("the router's loss has the coefficient of model.moe_aux_loss_coef", f"{_M}.moe_aux_loss_coeff", off=(None, 0, 0.0), objective=True),
    lost("another mean of the loss", f"{_M}.calculate_per_token_loss", f"{_M}.do_not_average_loss", f"{_M}.scale_loss_by_dp_cp_size",
         f"{_M}.cp_normalize", objective=True),
    *(lost(f"a key of older versions; nearest: {new}, its name now", old, off=(None,), objective=True) for old, new in _OLD_NAMES.items()),
    lost("the language model trains", f"{_M}.freeze_config.freeze_language_model", objective=True),
    lost("a response ends at its end token", f"{_G}.ignore_eos", objective=True),
    lost_together("a policy that is trained quantized; nearest: model.fp8", "policy.quant_*"),
    lost("images, sound and video are not read: the policy would see the text alone", "policy.is_vlm", "data.*.video_*", "data.*.num_frames",
         "policy.tokenizer.video.*", "policy.tokenizer.audio.*", "policy.tokenizer.use_processor", f"{_G}.vllm_cfg.video.*",
         f"{_G}.vllm_cfg.limit_mm_per_prompt.*", objective=True),
    lost("a reward model; nearest: a reward function path.py:name", "policy.reward_model_cfg.enabled", objective=True),
    lost_together("the first weights come from model.path", "policy.pretrained_checkpoint.*", "checkpointing.pretrained_checkpoint.*"),
    lost("the engine's routes are not replayed; nearest: model.routing_replay scoring", "policy.router_replay.enabled"),
    lost("no draft model is trained", "policy.draft.enabled"),
    lost("a part of the rows alone", "data.train.allowed_problem_types", "data.validation.allowed_problem_types", "data.*.min_generation_tokens",
         objective=True),
    lost("an end by a metric; nearest: a shorter run", "grpo.stop_at_validation_metric"),
    lost("an evaluation at the end; nearest: eval.every that divides the steps", "grpo.val_at_end"),
    lost("evaluation begins with the first eval.every", "grpo.val_start_at", off=(None, -1, 0)),
    lost("weights of several rewards", "grpo.adv_estimator.reward_weights", objective=True),
    lost_together("penalties on thoughts and answers; nearest: a reward function", "reward_penalties.*"),
    lost_together("no teacher's KL; nearest: a reward function", "on_policy_distillation", "on_policy_distillation.*"),
    lost_together("another trainer, whose samples may be older; nearest: rollout.async_steps", "async_rl.*"),
)  # fmt: skip

NEMO = Table("nemo", "NeMo-RL 7ea279a (2026-08-22)", nemo_defaults, _RULES)
