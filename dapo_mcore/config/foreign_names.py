"""What verl, slime and NeMo-RL call our keys: one list for messages about unknown keys and for the tables of `dapo-mcore import`.

Change here: a foreign name, our key for it, and its unit. How a value is converted is in foreign/tables/; foreign_lookup.py finds
what somebody has written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Name(NamedTuple):
    """Our key for a foreign one.

    ours: the dotted key; several that the foreign one sets together are joined by `, `.
    unit: the unit of ours and how the foreign value becomes it, in words; "" if the value stands as it is and says it all.
    """

    ours: str
    unit: str = ""

    @property
    def keys(self) -> tuple[str, ...]:
        """Our keys, one by one."""
        return tuple(self.ours.split(", "))


_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
_MODEL, _OPTIM, _MEGATRON = "actor_rollout_ref.model", f"{_ACTOR}.optim", f"{_ACTOR}.megatron"
_COV = f"{_ACTOR}.policy_loss"
_TRACKERS = "observe.wandb_project, observe.mlflow_experiment, observe.swanlab_project"
_EPOCHS = "every prompt once per epoch; or num_rollout_steps"
TRAINING_GPUS = "training takes its GPUs from torchrun --nnodes and --nproc-per-node"
_NODES = f"GPUs / tensor_parallel of a server; {TRAINING_GPUS}"

VERL: Mapping[str, Name] = {
    "trainer.experiment_name": Name("name", "letters, digits, dots, dashes and underscores"),
    "trainer.default_local_dir": Name("output_dir", "the run's folder is output_dir/name"),
    "trainer.total_epochs": Name("num_epochs", _EPOCHS),
    "trainer.total_training_steps": Name("num_rollout_steps", "rollout steps"),
    "data.seed": Name("seed", "also of weights and sampling"),
    f"{_MODEL}.path": Name("model.path", "a Hugging Face folder or a hub name"),
    f"{_MODEL}.override_config": Name("model.overrides", "keys of config.json"),
    f"{_MODEL}.trust_remote_code": Name("model.trust_remote_code"),
    f"{_MODEL}.enable_gradient_checkpointing": Name("model.recompute", "true: full, false: none"),
    f"{_MODEL}.enable_activation_offload": Name("model.offload_activations"),
    f"{_ACTOR}.fsdp_config.model_dtype": Name("model.dtype", "verl keeps fp32 weights and computes in bf16: bf16"),
    f"{_ACTOR}.router_replay.mode": Name("model.routing_replay", "R2: scoring; disabled: none"),
    f"{_MEGATRON}.override_transformer_config": Name("megatron, model.recompute", "fields of TransformerConfig"),
    f"{_MEGATRON}.tensor_model_parallel_size": Name("parallel.tensor_parallel", "ranks"),
    f"{_MEGATRON}.pipeline_model_parallel_size": Name("parallel.pipeline_parallel", "ranks"),
    f"{_MEGATRON}.virtual_pipeline_model_parallel_size": Name("parallel.virtual_pipeline_parallel", "chunks per stage"),
    f"{_MEGATRON}.context_parallel_size": Name("parallel.context_parallel", "ranks"),
    f"{_MEGATRON}.expert_model_parallel_size": Name("parallel.expert_parallel", "ranks"),
    f"{_MEGATRON}.expert_tensor_parallel_size": Name("parallel.expert_tensor_parallel", "ranks"),
    f"{_MEGATRON}.sequence_parallel": Name("parallel.sequence_parallel", "only with tensor_parallel above 1"),
    f"{_ACTOR}.ulysses_sequence_parallel_size": Name(
        "parallel.context_parallel",
        "ranks; the import asks for a layout and leaves this at 1: tensor_parallel splits weights, too",
    ),
    "actor_rollout_ref.nccl_timeout": Name("parallel.timeout_minutes", "minutes: seconds / 60, at least the default"),
    "data.train_files": Name("data.files", "a list of files"),
    "data.prompt_key": Name("data.prompt_key"),
    "data.reward_fn_key": Name("data.source_key"),
    "data.apply_chat_template_kwargs": Name("data.chat_template_kwargs"),
    "data.max_prompt_length": Name("data.max_prompt_tokens", "tokens"),
    "data.truncation": Name("data.on_long_prompt", "left: truncate_left; filter_overlong_prompts=True: drop"),
    "data.filter_overlong_prompts": Name("data.on_long_prompt", "true: drop; else data.truncation holds"),
    "data.shuffle": Name("data.shuffle"),
    "data.train_max_samples": Name("data.limit", "rows; -1: null"),
    f"{_ROLLOUT}.name": Name("rollout.engine", "servers are SGLang's: vLLM's options do not carry over"),
    f"{_ROLLOUT}.n": Name("rollout.group_size", "responses per prompt"),
    "data.max_response_length": Name("rollout.max_response_tokens", "tokens"),
    f"{_ROLLOUT}.temperature": Name("rollout.temperature"),
    f"{_ROLLOUT}.top_p": Name("rollout.top_p"),
    f"{_ROLLOUT}.top_k": Name("rollout.top_k", "-1: all tokens"),
    f"{_ROLLOUT}.tensor_model_parallel_size": Name("rollout.sglang.tensor_parallel", "GPUs of one server"),
    "trainer.nnodes": Name("rollout.sglang.num_servers", _NODES),
    "trainer.n_gpus_per_node": Name("rollout.sglang.num_servers", _NODES),
    "actor_rollout_ref.hybrid_engine": Name("rollout.sglang.colocated", "servers and training share GPUs"),
    f"{_ROLLOUT}.quantization": Name("rollout.sglang.quantize", "fp8 with scales per 128 × 128 tile; null: none"),
    f"{_ROLLOUT}.gpu_memory_utilization": Name(
        "rollout.sglang.server_args", "such as {mem-fraction-static: 0.6}; from vLLM: tune it again"
    ),
    f"{_ROLLOUT}.enforce_eager": Name("rollout.sglang.server_args", "{disable-cuda-graph: true}"),
    f"{_ROLLOUT}.max_num_seqs": Name("rollout.sglang.server_args", "{max-running-requests: …}"),
    f"{_ROLLOUT}.enable_chunked_prefill": Name("rollout.sglang.server_args", "false: {chunked-prefill-size: -1}"),
    f"{_ROLLOUT}.max_model_len": Name("rollout.sglang.server_args", "{context-length: …}, 2 more than verl's"),
    f"{_ROLLOUT}.enable_prefix_caching": Name("rollout.sglang.server_args", "false: {disable-radix-cache: true}"),
    f"{_ROLLOUT}.expert_parallel_size": Name("rollout.sglang.server_args", "{ep-size: …}"),
    f"{_ROLLOUT}.engine_kwargs.sglang": Name("rollout.sglang.server_args", "the options' names with dashes"),
    "data.train_batch_size": Name("sampling.train_batch_prompts", "prompts per rollout step"),
    "data.gen_batch_size": Name("sampling.gen_batch_prompts", "prompts per generation batch"),
    "algorithm.filter_groups.enable": Name("sampling.style", "true: filter; false: none"),
    "algorithm.filter_groups.max_num_gen_batches": Name("sampling.max_gen_batches", "0 (no limit): 1000000"),
    "reward_model.reward_manager": Name(
        "reward.function", "naive, dapo: the rule follows each row's data_source, which is by_source"
    ),
    "custom_reward_function.path": Name("reward.function", "path/to/file.py:function"),
    "custom_reward_function.reward_kwargs": Name("reward.kwargs"),
    "reward_model.overlong_buffer.enable": Name("reward.overlong.penalty"),
    "reward_model.overlong_buffer.len": Name("reward.overlong.cache", "tokens; only if the penalty is on"),
    "reward_model.overlong_buffer.penalty_factor": Name("reward.overlong.factor", "only if the penalty is on"),
    "reward_model.max_resp_len": Name("reward.overlong.max_length", "response tokens"),
    "algorithm.adv_estimator": Name(
        "algo.advantage, algo.advantage_std, algo.advantage_baseline",
        "grpo: group; gae: gae with a critic; rloo: group with advantage_baseline leave-one-out and advantage_std none",
    ),
    "algorithm.norm_adv_by_std_in_grpo": Name("algo.advantage_std", "false: none; true: unbiased"),
    "algorithm.gamma": Name("algo.gamma", "only with advantage gae"),
    "algorithm.lam": Name("algo.lam", "only with advantage gae"),
    f"{_ACTOR}.clip_ratio_low": Name("algo.clip_low"),
    f"{_ACTOR}.clip_ratio_high": Name("algo.clip_high"),
    f"{_ACTOR}.clip_ratio_c": Name("algo.dual_clip", "null: off; verl's is 3 if unset"),
    f"{_COV}.loss_mode": Name("algo.policy_loss", "vanilla: clip; gspo, cispo, clip_cov and kl_cov by their names"),
    f"{_COV}.kl_cov_ratio": Name("algo.kl_cov", "{ratio: …}"),
    f"{_COV}.ppo_kl_coef": Name("algo.kl_cov", "{coef: …}"),
    f"{_COV}.clip_cov_ratio": Name("algo.clip_cov", "{ratio: …}"),
    f"{_COV}.clip_cov_lb": Name("algo.clip_cov", "{lower: …}"),
    f"{_COV}.clip_cov_ub": Name("algo.clip_cov", "{upper: …}"),
    f"{_ACTOR}.loss_agg_mode": Name("algo.loss_mode"),
    f"{_ACTOR}.loss_scale_factor": Name("algo.loss_length", "seq-mean-token-sum-norm: tokens"),
    f"{_ACTOR}.entropy_coeff": Name("algo.entropy_coef"),
    "algorithm.use_kl_in_reward": Name("algo.kl.place", "true: reward, with the coefficient in algo.kl.coef"),
    "algorithm.kl_ctrl.kl_coef": Name("algo.kl.coef", "only if use_kl_in_reward is true, else 0"),
    "algorithm.kl_penalty": Name("algo.kl.estimator", "kl: k1, mse: k2, low_var_kl: k3"),
    f"{_ACTOR}.use_kl_loss": Name("algo.kl.coef", "true: kl_loss_coef with algo.kl.place loss; false: 0"),
    f"{_ACTOR}.kl_loss_coef": Name("algo.kl.coef", "only if use_kl_loss is true, else 0"),
    f"{_ACTOR}.kl_loss_type": Name("algo.kl.estimator", "kl: k1, mse: k2, low_var_kl: k3"),
    "algorithm.rollout_correction.rollout_is": Name("algo.tis", "{mode: truncate, level: token or sequence}"),
    "algorithm.rollout_correction.rollout_is_threshold": Name("algo.tis", "{cap: …}, only if rollout_is is set"),
    "algorithm.rollout_correction.rollout_rs": Name("algo.rejection", "{level: token, sequence or geometric}"),
    "algorithm.rollout_correction.rollout_rs_threshold": Name("algo.rejection", "{lower: …, upper: …}"),
    "algorithm.rollout_correction.bypass_mode": Name("algo.old_logprobs", "true: rollout; false: actor"),
    f"{_ACTOR}.tis_imp_ratio_cap": Name("algo.tis", "{mode: truncate, cap: …}; -1: off"),
    f"{_ACTOR}.ppo_mini_batch_size": Name("batch.mini_batch_prompts", "prompts per gradient step"),
    f"{_ACTOR}.ppo_max_token_len_per_gpu": Name("batch.max_tokens", "tokens of a micro-batch on a rank"),
    f"{_ACTOR}.ppo_micro_batch_size_per_gpu": Name(
        "batch.max_tokens", "tokens of a micro-batch on a rank: samples × (prompt + response) / context_parallel"
    ),
    f"{_ACTOR}.ppo_epochs": Name("batch.epochs", "passes over a rollout step's samples"),
    f"{_ACTOR}.shuffle": Name("batch.shuffle"),
    f"{_MODEL}.use_remove_padding": Name("batch.packing"),
    f"{_OPTIM}.lr": Name("optimizer.lr"),
    f"{_OPTIM}.min_lr": Name("optimizer.min_lr"),
    f"{_OPTIM}.min_lr_ratio": Name("optimizer.min_lr", "the ratio × lr"),
    f"{_OPTIM}.lr_warmup_steps": Name(
        "optimizer.warmup_rollout_steps", "rollout steps: verl's scheduler steps once in each"
    ),
    f"{_OPTIM}.lr_warmup_steps_ratio": Name("optimizer.warmup_rollout_steps", "rollout steps: the ratio × all of them"),
    f"{_OPTIM}.lr_scheduler_type": Name("optimizer.schedule", "constant or cosine"),
    f"{_OPTIM}.lr_decay_style": Name("optimizer.schedule", "constant or cosine"),
    f"{_OPTIM}.lr_decay_steps": Name("optimizer.decay_rollout_steps", "rollout steps"),
    f"{_OPTIM}.weight_decay": Name("optimizer.weight_decay", "of matrices; verl's FSDP decays norms and biases, too"),
    f"{_OPTIM}.betas": Name("optimizer.beta1, optimizer.beta2"),
    f"{_OPTIM}.clip_grad": Name("optimizer.clip_grad"),
    f"{_ACTOR}.grad_clip": Name("optimizer.clip_grad"),
    f"{_MEGATRON}.use_distributed_optimizer": Name("optimizer.distributed"),
    f"{_OPTIM}.override_optimizer_config": Name("optimizer.offload_fraction", "the fraction of the state on the host"),
    "critic.optim.lr": Name("critic.optimizer.lr"),
    "critic.optim.weight_decay": Name("critic.optimizer.weight_decay"),
    "critic.optim.lr_warmup_steps": Name("critic.optimizer.warmup_rollout_steps", "rollout steps"),
    "critic.cliprange_value": Name("critic.clip"),
    "trainer.critic_warmup": Name(
        "critic.warmup_steps", "rollout steps: the number - 1, as verl trains the policy from that step on"
    ),
    "data.val_files": Name("eval.sets", "a named set per file: {aime24: {files: […]}}"),
    "data.val_max_samples": Name("eval.sets", "limit of each set: rows; -1: null"),
    "trainer.test_freq": Name("eval.every", "rollout steps; -1 (never): null"),
    "trainer.val_before_train": Name("eval.at_start"),
    f"{_ROLLOUT}.val_kwargs.n": Name("eval.samples_per_prompt", "responses per prompt"),
    f"{_ROLLOUT}.val_kwargs.temperature": Name("eval.temperature", "0: greedy"),
    f"{_ROLLOUT}.val_kwargs.do_sample": Name("eval.temperature", "false meant 0 (greedy) before verl's agent loop"),
    f"{_ROLLOUT}.val_kwargs.top_p": Name("eval.top_p"),
    f"{_ROLLOUT}.val_kwargs.top_k": Name("eval.top_k", "-1: all tokens"),
    "trainer.save_freq": Name("checkpoint.every", "rollout steps; -1: null"),
    "trainer.max_actor_ckpt_to_keep": Name("checkpoint.keep", "checkpoints"),
    "trainer.resume_mode": Name("checkpoint.resume", "auto; disable: never; resume_path: the folder"),
    "trainer.resume_from_path": Name("checkpoint.resume", "a checkpoint of dapo_mcore"),
    "trainer.logger": Name(f"observe.tensorboard, {_TRACKERS}", "loggers by their own keys"),
    "trainer.project_name": Name(_TRACKERS, "only with such a one among the loggers"),
    "trainer.log_val_generations": Name("observe.eval_samples_per_set", "answers of each evaluation set"),
    "trainer.rollout_data_dir": Name("observe.samples_per_step", "samples kept in the run's folder"),
}
"""verl b178a3c (2026-01-29) and the recipes at 48ea0a7; older names of the same settings are in the table."""

SLIME: Mapping[str, Name] = {
    "num-rollout": Name("num_rollout_steps", "rollout steps"),
    "num-epoch": Name("num_epochs", _EPOCHS),
    "wandb-group": Name("name", "letters, digits, dots, dashes and underscores"),
    "rollout-seed": Name("seed", "also of weights and sampling"),
    "hf-checkpoint": Name("model.path", "a Hugging Face folder or a hub name"),
    "prompt-data": Name("data.files", "a list of files"),
    "input-key": Name("data.prompt_key"),
    "label-key": Name("data.answer_key"),
    "apply-chat-template": Name("data.chat_template", "true"),
    "apply-chat-template-kwargs": Name("data.chat_template_kwargs"),
    "rollout-shuffle": Name("data.shuffle"),
    "rollout-max-prompt-len": Name("data.max_prompt_tokens", "tokens"),
    "rollout-batch-size": Name("sampling.train_batch_prompts", "prompts per rollout step"),
    "over-sampling-batch-size": Name("sampling.gen_batch_prompts", "prompts per generation batch"),
    "partial-rollout": Name("sampling.on_full", "keep"),
    "n-samples-per-prompt": Name("rollout.group_size", "responses per prompt"),
    "rollout-max-response-len": Name("rollout.max_response_tokens", "tokens"),
    "rollout-temperature": Name("rollout.temperature"),
    "rollout-top-p": Name("rollout.top_p"),
    "rollout-top-k": Name("rollout.top_k", "-1: all tokens"),
    "rollout-stop": Name("rollout.stop", "texts or ids"),
    "rollout-num-gpus": Name("rollout.sglang.num_servers", "GPUs / tensor_parallel of a server"),
    "rollout-num-gpus-per-engine": Name("rollout.sglang.tensor_parallel", "GPUs of one server"),
    "colocate": Name("rollout.sglang.colocated", "true"),
    "sglang-mem-fraction-static": Name("rollout.sglang.server_args", "{mem-fraction-static: …}"),
    "rm-type": Name("reward.function", "dapo: math_dapo; other rules are for you to decide"),
    "custom-rm-path": Name("reward.function", "path/to/file.py:function, which scores one response"),
    "global-batch-size": Name("batch.mini_batch_samples", "samples per gradient step"),
    "num-steps-per-rollout": Name("batch.mini_batch_prompts", "prompts per gradient step: rollout-batch-size / steps"),
    "max-tokens-per-gpu": Name("batch.max_tokens", "tokens of a micro-batch on a rank"),
    "advantage-estimator": Name("algo.advantage", "grpo: group; ppo: gae"),
    "eps-clip": Name("algo.clip_low", "also clip_high where eps-clip-high is unset"),
    "eps-clip-high": Name("algo.clip_high"),
    "eps-clip-c": Name("algo.dual_clip"),
    "entropy-coef": Name("algo.entropy_coef"),
    "kl-coef": Name("algo.kl.coef", "with algo.kl.place reward, and only with ppo"),
    "kl-loss-coef": Name("algo.kl.coef", "only with use-kl-loss, else 0"),
    "use-kl-loss": Name("algo.kl.coef", "kl-loss-coef, with algo.kl.place loss"),
    "kl-loss-type": Name("algo.kl.estimator", "low_var_kl: k3; unset: k1"),
    "use-tis": Name("algo.tis", "{mode: truncate, cap: …}"),
    "tis-clip": Name("algo.tis", "{cap: …}"),
    "tis-clip-low": Name("algo.tis", "{lower: …}"),
    "lr": Name("optimizer.lr"),
    "lr-decay-style": Name("optimizer.schedule", "constant or cosine"),
    "lr-warmup-iters": Name("optimizer.warmup_updates", "gradient steps"),
    "weight-decay": Name("optimizer.weight_decay"),
    "adam-beta1": Name("optimizer.beta1"),
    "adam-beta2": Name("optimizer.beta2"),
    "adam-eps": Name("optimizer.eps"),
    "clip-grad": Name("optimizer.clip_grad"),
    "deterministic-mode": Name("deterministic"),
    "use-routing-replay": Name("model.routing_replay", "scoring"),
    "tensor-model-parallel-size": Name("parallel.tensor_parallel", "ranks"),
    "pipeline-model-parallel-size": Name("parallel.pipeline_parallel", "ranks"),
    "context-parallel-size": Name("parallel.context_parallel", "ranks"),
    "expert-model-parallel-size": Name("parallel.expert_parallel", "ranks"),
    "expert-tensor-parallel-size": Name("parallel.expert_tensor_parallel", "ranks"),
    "sequence-parallel": Name("parallel.sequence_parallel", "true"),
    "eval-interval": Name("eval.every", "rollout steps"),
    "eval-prompt-data": Name("eval.sets", "a named set per file: {aime: {files: […]}}"),
    "n-samples-per-eval-prompt": Name("eval.samples_per_prompt", "responses per prompt"),
    "eval-max-response-len": Name("eval.max_response_tokens", "tokens"),
    "eval-top-p": Name("eval.top_p"),
    "save": Name("output_dir", "the run's folder is output_dir/name"),
    "save-interval": Name("checkpoint.every", "rollout steps"),
    "use-wandb": Name("observe.wandb_project", "the project's name"),
    "wandb-project": Name("observe.wandb_project"),
}
"""slime 624b824: flags without their dashes."""

NEMO: Mapping[str, Name] = {
    "grpo.max_num_steps": Name("num_rollout_steps", "rollout steps; max_num_epochs may end the run before"),
    "grpo.max_num_epochs": Name("num_epochs", _EPOCHS),
    "logger.wandb.name": Name("name", "letters, digits, dots, dashes and underscores"),
    "grpo.seed": Name("seed", "also of weights and sampling"),
    "policy.model_name": Name("model.path", "a Hugging Face folder or a hub name"),
    "policy.precision": Name("model.dtype", "bfloat16: bf16, float32: fp32"),
    "policy.hf_config_overrides": Name("model.overrides", "keys of config.json"),
    "policy.tokenizer.chat_template_kwargs": Name("data.chat_template_kwargs"),
    "policy.megatron_cfg.tensor_model_parallel_size": Name("parallel.tensor_parallel", "ranks"),
    "policy.megatron_cfg.pipeline_model_parallel_size": Name("parallel.pipeline_parallel", "ranks"),
    "policy.megatron_cfg.context_parallel_size": Name("parallel.context_parallel", "ranks"),
    "policy.megatron_cfg.expert_model_parallel_size": Name("parallel.expert_parallel", "ranks"),
    "policy.megatron_cfg.expert_tensor_parallel_size": Name("parallel.expert_tensor_parallel", "ranks"),
    "policy.dtensor_cfg.tensor_parallel_size": Name(
        "parallel.tensor_parallel", "another layout than Megatron's: decide"
    ),
    "policy.tokenizer.chat_template": Name("data.chat_template", "default: true; null: false; or a Jinja file"),
    "data.default.prompt_file": Name(
        "data.prompt_template", "the file's text, with {prompt} in place of {} and single braces"
    ),
    "data.default.system_prompt_file": Name("data.system_prompt", "the file's text"),
    "data.max_input_seq_length": Name("data.max_prompt_tokens", "tokens"),
    "data.shuffle": Name("data.shuffle"),
    "data.train": Name("data.files", "a list of files"),
    "data.validation": Name("eval.sets", "a named set per file: {aime24: {files: […]}}"),
    "grpo.num_generations_per_prompt": Name("rollout.group_size", "responses per prompt"),
    "policy.generation.max_new_tokens": Name("rollout.max_response_tokens", "tokens"),
    "policy.generation.temperature": Name("rollout.temperature"),
    "policy.generation.top_p": Name("rollout.top_p"),
    "policy.generation.top_k": Name("rollout.top_k", "null: -1"),
    "policy.generation.stop_strings": Name("rollout.stop", "texts or ids"),
    "policy.generation.vllm_cfg.tensor_parallel_size": Name("rollout.sglang.tensor_parallel", "GPUs of one server"),
    "cluster.num_nodes": Name("rollout.sglang.num_servers", _NODES),
    "grpo.num_prompts_per_step": Name("sampling.train_batch_prompts", "prompts per rollout step"),
    "grpo.batch_multiplier": Name("sampling.gen_batch_prompts", "prompts: the multiplier × num_prompts_per_step"),
    "grpo.use_dynamic_sampling": Name("sampling.style", "true: filter; false: none"),
    "grpo.dynamic_sampling_max_gen_batches": Name("sampling.max_gen_batches"),
    "grpo.reward_shaping.overlong_buffer_length": Name("reward.overlong.cache", "tokens; only if it is enabled"),
    "grpo.reward_shaping.overlong_buffer_penalty": Name("reward.overlong.factor", "only if it is enabled"),
    "grpo.overlong_filtering": Name("reward.overlong.filter"),
    "grpo.normalize_rewards": Name(
        "algo.advantage_std", "true: unbiased, with a leave-one-out baseline others; false: none"
    ),
    "grpo.use_leave_one_out_baseline": Name("algo.advantage_baseline", "true: leave-one-out; false: mean"),
    "loss_fn.ratio_clip_min": Name("algo.clip_low"),
    "loss_fn.ratio_clip_max": Name("algo.clip_high"),
    "loss_fn.ratio_clip_c": Name("algo.dual_clip"),
    "loss_fn.token_level_loss": Name("algo.loss_mode", "true: token-mean; false: seq-mean-token-mean"),
    "loss_fn.reference_policy_kl_penalty": Name("algo.kl.coef"),
    "loss_fn.reference_policy_kl_type": Name("algo.kl.estimator", "k1 and k3: k2, which has their gradient there"),
    "loss_fn.use_importance_sampling_correction": Name("algo.tis", "{mode: truncate, cap: …}"),
    "loss_fn.truncated_importance_sampling_ratio": Name("algo.tis", "{cap: …}"),
    "policy.train_global_batch_size": Name("batch.mini_batch_prompts", "prompts: samples / num_generations_per_prompt"),
    "policy.optimizer.kwargs.lr": Name("optimizer.lr"),
    "policy.optimizer.kwargs.weight_decay": Name("optimizer.weight_decay"),
    "policy.max_grad_norm": Name("optimizer.clip_grad", "null: 0"),
    "policy.megatron_cfg.scheduler.lr_warmup_iters": Name("optimizer.warmup_rollout_steps", "rollout steps"),
    "grpo.val_period": Name("eval.every", "rollout steps"),
    "grpo.val_at_start": Name("eval.at_start"),
    "grpo.max_val_samples": Name("eval.sets", "limit of each set: rows"),
    "grpo.val_num_generations_per_prompt": Name("eval.samples_per_prompt", "responses per prompt"),
    "checkpointing.checkpoint_dir": Name("output_dir", "the run's folder is output_dir/name"),
    "checkpointing.save_period": Name("checkpoint.every", "rollout steps"),
    "checkpointing.keep_top_k": Name("checkpoint.keep_best", "checkpoints, by checkpoint.best_metric"),
    "env.math.num_workers": Name("reward.workers", "processes"),
    "logger.wandb.project": Name("observe.wandb_project", "only with wandb_enabled"),
    "logger.mlflow.experiment_name": Name("observe.mlflow_experiment", "only with mlflow_enabled"),
    "logger.swanlab.project": Name("observe.swanlab_project", "only with swanlab_enabled"),
}
"""NeMo-RL 7ea279a."""

DIALECTS: Mapping[str, Mapping[str, Name]] = {"verl": VERL, "slime": SLIME, "nemo": NEMO}
"""The names of each dialect."""
TITLES = {"verl": "verl", "slime": "slime", "nemo": "NeMo-RL"}
