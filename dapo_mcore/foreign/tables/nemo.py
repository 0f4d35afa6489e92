"""NeMo-RL's table: what each of its keys becomes here, as of commit 7ea279a (2026-08-22).

Change here: a key of NeMo-RL. Its name and our key are in config/foreign_names.py, its default in nemo_defaults.py, and what follows
from several keys in nemo_objective.py and nemo_run.py.
"""

from __future__ import annotations

from functools import partial

from dapo_mcore.config.foreign_names import NEMO as NAMES
from dapo_mcore.foreign.table import Table, changed, combined, joined, lost, meaningless
from dapo_mcore.foreign.table import same as _same
from dapo_mcore.foreign.tables import nemo_objective as objective
from dapo_mcore.foreign.tables import nemo_run as run
from dapo_mcore.foreign.tables.nemo_defaults import nemo_defaults

same = partial(_same, NAMES)
_G, _M, _L = "policy.generation", "policy.megatron_cfg", "loss_fn"

_RULES = (
    combined(run.length, "num_rollout_steps, num_epochs", "grpo.max_num_steps", "grpo.max_num_epochs"),
    same("grpo.seed"),
    combined(run.saving, "output_dir, checkpoint.every, checkpoint.keep, checkpoint.keep_best, checkpoint.best_metric, "
             "checkpoint.best_mode", "checkpointing.checkpoint_dir", "checkpointing.enabled", "checkpointing.save_period",
             "checkpointing.keep_top_k", "checkpointing.metric_name", "checkpointing.higher_is_better"),
    combined(run.model, "model.path, model.dtype, model.recompute", "policy.model_name", "policy.precision",
             "policy.dtensor_cfg.activation_checkpointing", f"{_M}.activation_checkpointing"),
    combined(run.overrides, "model.overrides", "policy.hf_config_overrides.*"),
    combined(run.layout, "parallel.tensor_parallel, parallel.pipeline_parallel, parallel.context_parallel, parallel.expert_parallel, "
             "parallel.expert_tensor_parallel, parallel.sequence_parallel", f"{_M}.*_parallel_size", f"{_M}.sequence_parallel",
             "policy.dtensor_cfg.*"),
    combined(run.data, "data.files, data.prompt_key, data.answer_key, data.chat_template, data.deduplicate", "data.train.data_path",
             "data.train.dataset_name", "data.train.input_key", "data.train.output_key", "data.default.prompt_file", "data.train",
             "data.custom_dataloader"),
    same("data.shuffle"),
    same("policy.tokenizer.chat_template_kwargs"),
    combined(run.lengths, "data.max_prompt_tokens, data.on_long_prompt, rollout.max_response_tokens", "data.max_input_seq_length",
             f"{_G}.max_new_tokens", "policy.max_total_sequence_length"),
    same("grpo.num_generations_per_prompt"),
    same(f"{_G}.temperature"),
    same(f"{_G}.top_p"),
    changed(NAMES, lambda k: k if k else -1, f"{_G}.top_k"),
    joined("rollout.stop", "texts and ids in one list", f"{_G}.stop_strings", f"{_G}.stop_token_ids"),
    combined(run.servers, "rollout.engine, rollout.sglang.tensor_parallel, rollout.sglang.num_servers, rollout.sglang.colocated, "
             "rollout.sglang.sync, rollout.sglang.placement, rollout.sglang.host, rollout.sglang.server_args", f"{_G}.backend",
             f"{_G}.vllm_cfg.tensor_parallel_size", f"{_G}.vllm_cfg.gpu_memory_utilization", f"{_G}.vllm_cfg.enforce_eager",
             f"{_G}.colocated.*", "cluster.num_nodes", "cluster.gpus_per_node"),
    combined(run.sampling, "sampling.train_batch_prompts, sampling.style, sampling.gen_batch_prompts, sampling.max_gen_batches, "
             "sampling.carry_surplus", "grpo.num_prompts_per_step", "grpo.use_dynamic_sampling", "grpo.batch_multiplier",
             "grpo.dynamic_sampling_max_gen_batches"),
    combined(objective.reward, "reward.function, reward.workers", "data.default.env_name", "env.math.math_verify_impl", "env.math.num_workers", "grpo.reward_scaling.*"),
    objective.ENVIRONMENTS,
    combined(objective.overlong, "reward.overlong.penalty, reward.overlong.cache, reward.overlong.factor, reward.overlong.max_length, "
             "reward.overlong.filter", "grpo.reward_shaping.*", "grpo.overlong_filtering"),
    combined(objective.estimator, "algo.advantage, algo.advantage_std, algo.advantage_baseline", "grpo.adv_estimator.name",
             "grpo.normalize_rewards", "grpo.use_leave_one_out_baseline", "grpo.adv_estimator.normalize_rewards",
             "grpo.adv_estimator.use_leave_one_out_baseline"),
    combined(objective.policy_loss, "algo.policy_loss, algo.clip_low, algo.clip_high, algo.dual_clip, algo.loss_mode", f"{_L}.use_cispo",
             f"{_L}.sequence_level_importance_ratios", f"{_L}.token_level_loss", f"{_L}.ratio_clip_*", *objective.LOST_OF_THE_OBJECTIVE),
    combined(objective.kl, "algo.kl.coef, algo.kl.estimator, algo.kl.place", f"{_L}.reference_policy_kl_*", f"{_L}.use_kl_in_reward",
             f"{_L}.kl_output_clamp_value"),
    combined(objective.correction, "algo.tis.mode, algo.tis.cap, rollout.async_steps", f"{_L}.use_importance_sampling_correction",
             f"{_L}.truncated_importance_sampling_type", f"{_L}.truncated_importance_sampling_ratio*", "grpo.async_grpo.enabled",
             "grpo.async_grpo.max_trajectory_age_steps"),
    combined(run.batch, "batch.mini_batch_prompts, batch.shuffle, batch.max_tokens", "policy.train_global_batch_size",
             "policy.train_micro_batch_size"),
    combined(run.optimizer, "optimizer.lr, optimizer.weight_decay, optimizer.beta1, optimizer.beta2, optimizer.schedule, optimizer.min_lr, "
             "optimizer.warmup_rollout_steps, optimizer.decay_rollout_steps", "policy.optimizer.kwargs.lr",
             "policy.optimizer.kwargs.weight_decay", "policy.optimizer.kwargs.betas", "policy.scheduler", f"{_M}.optimizer.lr",
             f"{_M}.optimizer.min_lr", f"{_M}.optimizer.weight_decay", f"{_M}.optimizer.adam_beta?", f"{_M}.scheduler.lr_*"),
    same("policy.max_grad_norm"),
    combined(run.evaluation, "eval.every, eval.at_start, eval.sets, eval.samples_per_prompt, eval.temperature, eval.top_p, eval.top_k",
             "data.validation.data_path", "data.validation.dataset_name", "grpo.val_period", "grpo.val_at_start", "grpo.max_val_samples",
             "grpo.val_num_generations_per_prompt", f"{_G}.val_*"),
    combined(run.loggers, "observe.tensorboard, observe.wandb_project, observe.mlflow_experiment, observe.swanlab_project",
             "logger.tensorboard_enabled", "logger.wandb_enabled", "logger.wandb.project", "logger.mlflow_enabled",
             "logger.mlflow.experiment_name", "logger.swanlab_enabled", "logger.swanlab.project"),
    meaningless("of Megatron there", "it holds with megatron_cfg.enabled, or is chosen here by the device", f"{_M}.*"),
    meaningless("of the trainer", "they change no number here", "policy.make_sequence_length_divisible_by", "policy.logprob_*",
                "policy.generation_batch_size", "policy.sequence_packing.*", "policy.dynamic_batching.*", "policy.offload_optimizer_for_logprob",
                "policy.optimizer", "policy.optimizer.name", "policy.dtensor_cfg", "grpo.async_grpo", "policy.tokenizer", "policy.optimizer.kwargs.eps", "policy.optimizer.kwargs.foreach", "policy.optimizer.kwargs.fused",
                "grpo.val_batch_size", "grpo.val_start_at", "grpo.max_rollout_turns", "grpo.async_grpo.*", f"{_L}.kl_input_clamp_value",
                "policy.tokenizer.*", "data.num_workers", "data.use_multiple_dataloader", "data.default.*", "data.train.*",
                "data.validation.*", "data.validation", f"{_G}.vllm_cfg.*", f"{_G}.vllm_kwargs*", f"{_G}.*", "cluster.*"),
    meaningless("of checkpoints and loggers", "in the run's folder here", "checkpointing.*", "logger.*"),
    lost("LoRA: all weights train; nearest: full training with lr 1e-6", "policy.dtensor_cfg.lora_cfg.enabled", f"{_M}.peft.enabled"),
    lost("no system prompt is added to rows; nearest: write it into them", "data.default.system_prompt_file", "data.train.system_prompt_file",
         objective=True),
    lost("a template of its own; nearest: a Jinja file named by data.chat_template", "policy.tokenizer.chat_template", off=(None, "default")),
    lost("the whole file trains; nearest: write the part to a file of its own", "data.train.split_validation_size", off=(None, 0)),
    lost("the optimizer is AdamW", "policy.optimizer.name", off=(None, "torch.optim.AdamW")),
    lost("the optimizer is AdamW", f"{_M}.optimizer.optimizer", off=(None, "adam")),
    lost("routers train, too", f"{_M}.freeze_moe_router"),
    lost("a response ends at its end token", f"{_G}.ignore_eos", objective=True),
    lost("no draft model is trained", "policy.draft.enabled"),
    lost("an end by a metric; nearest: a shorter run", "grpo.stop_at_validation_metric"),
    lost("an evaluation at the end; nearest: eval.every that divides the steps", "grpo.val_at_end"),
    lost("penalties on thoughts and answers; nearest: a reward function", "reward_penalties.*", objective=True),
)  # fmt: skip

NEMO = Table("nemo", "NeMo-RL 7ea279a (2026-08-22)", nemo_defaults, _RULES)
