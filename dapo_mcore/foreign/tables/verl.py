"""verl's table: what each of its settings becomes here, as of commit b178a3c (2026-01-29) and verl-recipe 48ea0a7.

Change here: a setting of verl. Its name and our key are in config/foreign_names.py, its default in verl_defaults.py, and what
follows from several settings in verl_objective.py, verl_correction.py, verl_optimizer.py, verl_data.py, verl_servers.py,
verl_megatron.py and verl_run.py. What means nothing here is in verl_meaningless.py.
"""

from __future__ import annotations

from functools import partial

from dapo_mcore.config.foreign_names import VERL as NAMES
from dapo_mcore.foreign.table import Rule, Table, combined, lost, run_name
from dapo_mcore.foreign.table import changed as _changed
from dapo_mcore.foreign.table import same as _same
from dapo_mcore.foreign.tables import verl_correction as correction
from dapo_mcore.foreign.tables import verl_data as data
from dapo_mcore.foreign.tables import verl_megatron as megatron
from dapo_mcore.foreign.tables import verl_objective as objective
from dapo_mcore.foreign.tables import verl_optimizer as optimizer
from dapo_mcore.foreign.tables import verl_run as run
from dapo_mcore.foreign.tables import verl_servers as servers
from dapo_mcore.foreign.tables.verl_defaults import verl_defaults
from dapo_mcore.foreign.tables.verl_meaningless import MEANINGLESS

_A = "actor_rollout_ref.actor"
_R = "actor_rollout_ref.rollout"
_M = "actor_rollout_ref.model"
_G = f"{_A}.megatron"
_O = f"{_A}.optim"
same, changed = partial(_same, NAMES), partial(_changed, NAMES)


def _minutes(seconds: float) -> int:
    """Return the time-out in minutes. It must outlast a rollout, so it is at least our default."""
    return max(240, -(-int(seconds) // 60))


_OPTIMISES = ("algorithm.", "reward", "critic.", "custom_reward_function.", "data.", "async_training.", f"{_A}.", f"{_R}.", f"{_M}.",
              "actor_rollout_ref.ref.", "actor_rollout_ref.teacher.", "env.")  # fmt: skip
"""An unknown setting below one of these may change what is optimised."""


_RUN = (
    combined(objective.program, "algo.advantage"),
    lost(objective.UNREAD_CONFIGURATION, objective.CONFIGURATION, off=(None,), objective=True),
    run_name("trainer.experiment_name"),
    combined(run.folder, "output_dir", "trainer.default_local_dir"),
    combined(
        run.steps,
        "num_rollout_steps",
        "trainer.total_training_steps",
        "rollout.total_rollout_steps",
        "rollout.total_epochs",
    ),
    combined(run.epochs, "num_epochs", "trainer.total_epochs"),
    same("data.seed"),
)
_MODEL = (
    combined(run.model_path, "model.path", f"{_M}.path"),
    combined(run.dtype, "model.dtype", f"{_A}.fsdp_config.model_dtype", f"{_A}.fsdp_config.dtype", f"{_G}.dtype", f"{_R}.dtype",
             f"{_A}.fsdp_config.mixed_precision.param_dtype", f"{_A}.strategy"),
    combined(run.recompute, "model.recompute", f"{_M}.enable_gradient_checkpointing"),
    combined(run.replay, "model.routing_replay", f"{_A}.router_replay.mode"),
    combined(run.config_json, "model.overrides", f"{_M}.override_config*"),
    combined(run.trust, "model.trust_remote_code", f"{_M}.trust_remote_code", "data.trust_remote_code"),
    same(f"{_M}.enable_activation_offload"),
    combined(megatron.transformer_config,
             "megatron, model.recompute, model.fp8, model.moe_aux_loss_coef, deterministic", f"{_G}.override_transformer_config.*",
             f"{_G}.override_transformer_config"),
    lost("training is not quantized; nearest: model.fp8", f"{_A}.fsdp_config.qat.enable", f"{_G}.qat.enable", objective=True),
    lost("the weights are always read; nearest: model.init random", f"{_A}.load_weight", off=(None, True), objective=True),
    lost("fields of Megatron's model outside its TransformerConfig; nearest: the section megatron",
         f"{_G}.override_mcore_model_config", f"{_G}.override_mcore_model_config.*", off=(None, {}), objective=True),
    lost("weights are kept in fp32 and computed in bf16; nearest: model.dtype fp32", f"{_M}.torch_dtype",
         off=(None, "bfloat16", "bf16", "auto")),
    lost("the tokenizer is model.path's; nearest: put its files into that folder", f"{_M}.tokenizer_path", objective=True),
    lost("LoRA: all weights train, and a learning rate for LoRA is too high for that; nearest: full training with lr 1e-6",
         f"{_M}.lora_rank", f"{_M}.lora.rank", off=(None, 0, False, ""), objective=True),
    lost("the start is model.path's weights, without an adapter; nearest: merge the adapter into model.path first",
         f"{_M}.lora_adapter_path", off=(None, False, ""), objective=True),
    lost("the model's code is Megatron's; nearest: a family of examples/README.md", f"{_M}.external_lib"),
    lost("prompts have the tokenizer's template, not this text; nearest: write it to a Jinja file, and name that in data.chat_template "
         "and in each set of eval.sets", f"{_M}.custom_chat_template", objective=True),
    lost("the engine's routes are not replayed; nearest: model.routing_replay scoring", f"{_R}.enable_rollout_routing_replay"),
    lost("the configuration is model.path's; nearest: model.overrides", f"{_M}.hf_config_path"),
    lost("no multi-token prediction is trained", f"{_M}.mtp.enable", f"{_G}.mtp.enable", off=(None, False)),
)  # fmt: skip
_LAYOUT = (
    combined(servers.layout, "parallel.tensor_parallel, parallel.sequence_parallel, parallel.context_parallel",
             f"{_G}.sequence_parallel",
             f"{_A}.ulysses_sequence_parallel_size", f"{_A}.strategy"),
    same(f"{_G}.tensor_model_parallel_size"),
    same(f"{_G}.pipeline_model_parallel_size"),
    same(f"{_G}.virtual_pipeline_model_parallel_size"),
    same(f"{_G}.context_parallel_size"),
    same(f"{_G}.expert_model_parallel_size"),
    combined(servers.expert_tensor, "parallel.expert_tensor_parallel", f"{_G}.expert_tensor_parallel_size"),
    changed(_minutes, "actor_rollout_ref.nccl_timeout"),
)  # fmt: skip
_DATA = (
    combined(data.files, "data.files", "data.train_files"),
    same("data.prompt_key"),
    same("data.reward_fn_key"),
    combined(data.prompts, "data.chat_template, data.on_long_prompt, data.deduplicate", "data.truncation",
             "data.filter_overlong_prompts"),
    same("data.max_prompt_length"),
    same("data.shuffle"),
    combined(data.limit, "data.limit", "data.train_max_samples"),
    combined(data.template_kwargs, "data.chat_template_kwargs", "data.apply_chat_template_kwargs*"),
    lost("the class's own preparation of rows; nearest: write its rows to a file once, and name that file",
         "data.custom_cls.path", objective=True),
    Rule(tuple(data.COLUMNS), (), data.images, data.NO_IMAGES, objective=True),
    combined(data.vision_model, "model.path", f"{_M}.path"),
    lost("the sampler's order of prompts; nearest: data.shuffle", "data.sampler.class_path"),
    lost("rows are not generated while training; nearest: write them to a file once", "data.datagen.path", objective=True),
)  # fmt: skip
_ROLLOUT = (
    combined(servers.engine, "rollout.engine", f"{_R}.name"),
    same(f"{_R}.n"),
    combined(data.response_length, "rollout.max_response_tokens", "data.max_response_length", f"{_R}.response_length"),
    lost("tokens are sampled whatever their probability is to the most likely one's; nearest: rollout.top_p", f"{_R}.min_p",
         off=(None, 0), objective=True),
    lost("tokens are sampled without this penalty", f"{_R}.repetition_penalty", off=(None, 1), objective=True),
    lost("rollouts are always generated; nearest: leave it out", f"{_R}.skip_rollout", objective=True),
    lost("no response is dropped because it is long; nearest: sampling.on_full abort", f"{_R}.over_sample_rate", off=(None, 0),
         objective=True),
    lost("log-probs of the engine are after temperature and top-p, as they are used", f"{_R}.logprobs_mode",
         off=(None, "processed_logprobs")),
    lost("rollouts are not traced; nearest: observe.samples_per_step", f"{_R}.trace.backend"),
    same(f"{_R}.temperature"),
    same(f"{_R}.top_p"),
    changed(data.top_k, f"{_R}.top_k"),
    combined(servers.server_size, "rollout.sglang.tensor_parallel", f"{_R}.tensor_model_parallel_size"),
    combined(servers.num_servers, "rollout.sglang.num_servers", "trainer.nnodes", "trainer.n_gpus_per_node", "rollout.nnodes",
             "rollout.n_gpus_per_node"),
    combined(servers.server_places,
             "rollout.sglang.colocated, rollout.sglang.sync, rollout.sglang.placement, rollout.sglang.host",
             "actor_rollout_ref.hybrid_engine"),
    combined(servers.one_step_off, "rollout.async_steps, reward.workers, algo.tis.mode"),
    combined(servers.server_args, "rollout.sglang.server_args", f"{_R}.gpu_memory_utilization", f"{_R}.max_num_seqs",
             f"{_R}.max_model_len", f"{_R}.engine_kwargs.vllm.max_model_len", f"{_R}.engine_kwargs.vllm.max-model-len",
             f"{_R}.expert_parallel_size", f"{_R}.enforce_eager", f"{_R}.enable_chunked_prefill",
             f"{_R}.enable_prefix_caching", f"{_R}.engine_kwargs.sglang.*"),
    combined(servers.quantize, "rollout.sglang.quantize", f"{_R}.quantization"),
    combined(run.filtering, "sampling.style, sampling.gen_batch_prompts, sampling.max_gen_batches, sampling.carry_surplus",
             "algorithm.filter_groups.enable", "algorithm.filter_groups.metric", "algorithm.filter_groups.max_num_gen_batches",
             "data.gen_batch_size"),
    combined(run.train_batch, "sampling.train_batch_prompts", "data.train_batch_size"),
    lost("an option of vLLM or another engine; nearest: rollout.sglang.server_args", f"{_R}.engine_kwargs.vllm.hf_overrides.*",
         f"{_R}.engine_kwargs.vllm.kv_cache_dtype", f"{_R}.engine_kwargs.dynamo.*"),
)  # fmt: skip
_OBJECTIVE = (
    combined(objective.reward, "reward.function", "custom_reward_function.path", "custom_reward_function.name",
             "reward.custom_reward_function.path", "reward.custom_reward_function.name", "reward_model.reward_manager",
             "reward.reward_manager.name", "reward_manager.name"),
    combined(objective.reward_kwargs, "reward.kwargs", "custom_reward_function.reward_kwargs",
             "custom_reward_function.reward_kwargs.*", "reward.custom_reward_function.reward_kwargs",
             "reward.custom_reward_function.reward_kwargs.*"),
    combined(objective.overlong,
             "reward.overlong.penalty, reward.overlong.cache, reward.overlong.factor, reward.overlong.max_length",
             *objective.OVERLONG),
    combined(objective.estimator, "algo.advantage, algo.advantage_std, algo.advantage_baseline, algo.gamma, algo.lam",
             "algorithm.adv_estimator", "algorithm.norm_adv_by_std_in_grpo", "algorithm.gamma", "algorithm.lam"),
    combined(objective.policy_loss, "algo.policy_loss, algo.dual_clip, algo.kl_cov, algo.clip_cov, algo.clip_low, algo.clip_high", *objective.POLICY_LOSS,
             f"{_A}.loss_mode", f"{_A}.k_percent", f"{_A}.ppo_kl_coef", f"{_A}.clip_ratio_c", f"{_A}.clip_cov_lb",
             f"{_A}.clip_cov_ub", f"{_A}.clip_ratio_cov", f"{_A}.clip_cov_ratio"),
    combined(objective.clip_bounds, "algo.clip_low, algo.clip_high", f"{_A}.clip_ratio_low", f"{_A}.clip_ratio_high",
             f"{_A}.clip_ratio"),
    combined(objective.loss_mode, "algo.loss_mode, algo.loss_length", f"{_A}.loss_agg_mode", f"{_A}.loss_scale_factor",
             "trainer.use_legacy_worker_impl"),
    combined(objective.entropy, "algo.entropy_coef, algo.adaptive_entropy", f"{_A}.entropy_coeff", *objective.ADAPTIVE_ENTROPY),
    combined(correction.correction, "algo.tis, algo.rejection, algo.old_logprobs", *correction.SETTINGS, f"{_A}.tis_imp_ratio_cap"),
    lost("older names of algorithm.rollout_correction; nearest: write them as its rollout_is, rollout_is_threshold, rollout_rs",
         "algorithm.rollout_is", "algorithm.rollout_is_level", "algorithm.rollout_is_mode", "algorithm.rollout_is_threshold",
         "algorithm.rollout_is_threshold_lower", "algorithm.rollout_is_veto_threshold", "algorithm.rollout_rs",
         "algorithm.rollout_rs_threshold", objective=True),
    combined(objective.kl, "algo.kl.coef, algo.kl.place, algo.kl.estimator", "algorithm.use_kl_in_reward",
             "algorithm.kl_ctrl.kl_coef",
             "algorithm.kl_ctrl.type", "algorithm.kl_penalty", f"{_A}.use_kl_loss", f"{_A}.kl_loss_coef", f"{_A}.kl_loss_type"),
    combined(objective.tools, "tools", f"{_R}.multi_turn.enable", f"{_R}.multi_turn.tool_config_path",
             f"{_R}.multi_turn.interaction_config_path", "data.tool_config_path", f"{_R}.agent.default_agent_loop"),
    lost("a reward model's score; nearest: serve it, and ask it from a reward function path.py:name", "reward_model.enable",
         "reward.reward_model.enable", objective=True),
    lost("code runs in no sandbox of verl's; nearest: a reward function path.py:name that calls it",
         "reward_model.sandbox_fusion.url", "reward.sandbox_fusion.url", objective=True),
    lost("a reward manager of its own; nearest: a function of one response, reward.function path.py:name",
         "reward_manager.module.path",
         "reward.reward_manager.module.path", "reward_model.reward_loop_module_path", objective=True),
    lost("an agent loop of its own; nearest: the section agent", f"{_R}.agent.agent_loop_config_path",
         f"{_R}.agent.agent_loop_manager_class", f"{_R}.agent.custom_async_server.path", objective=True),
    lost("an agent loop of its own; nearest: the section agent", f"{_R}.agent.default_agent_loop",
         off=(None, "single_turn_agent", "tool_agent"), objective=True),
    lost("samples are not weighted again (PF-PPO)", "algorithm.use_pf_ppo", objective=True),
    lost("groups that are all right or all wrong stay in the batch; Skywork-OR1 drops them without new ones; nearest: "
         "sampling.style filter, which also fills the batch", "trainer.rejection_sample", objective=True),
    lost("the reference is model.path; nearest: model.path of the policy", "actor_rollout_ref.ref.model.*", objective=True),
    lost("responses are sampled; nearest: rollout.temperature", f"{_R}.do_sample", off=(None, True), objective=True),
    lost("a response ends at its end token", f"{_R}.ignore_eos", objective=True),
    lost("a run trains, always; nearest: eval.at_start with num_rollout_steps 1", "trainer.val_only", objective=True),
)  # fmt: skip
_UPDATES = (
    combined(run.mini_batch, "batch.mini_batch_prompts", f"{_A}.ppo_mini_batch_size"),
    combined(run.batch_tokens, "batch.max_tokens", f"{_A}.ppo_max_token_len_per_gpu", f"{_A}.ppo_micro_batch_size_per_gpu"),
    same(f"{_A}.ppo_epochs"),
    combined(run.shuffle, "batch.shuffle", f"{_A}.shuffle"),
    combined(run.packing, "batch.packing", f"{_M}.use_remove_padding", f"{_G}.use_remove_padding", f"{_A}.use_remove_padding"),
    same(f"{_O}.lr"),
    same(f"{_O}.weight_decay"),
    combined(optimizer.adam, "optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.offload_fraction", f"{_O}.betas",
             f"{_O}.override_optimizer_config", f"{_O}.override_optimizer_config.*"),
    combined(optimizer.clip_grad, "optimizer.clip_grad", f"{_O}.clip_grad", f"{_A}.grad_clip", f"{_O}.grad_clip"),
    combined(optimizer.schedule, "optimizer.schedule, optimizer.warmup_rollout_steps, optimizer.min_lr, optimizer.decay_rollout_steps",
             f"{_O}.lr_warmup_steps", f"{_O}.lr_warmup_steps_ratio", f"{_O}.lr_scheduler_type", f"{_O}.lr_decay_style",
             f"{_O}.warmup_style", f"{_O}.lr_decay_steps", f"{_O}.min_lr", f"{_O}.min_lr_ratio"),
    same(f"{_G}.use_distributed_optimizer"),
    lost("the optimizer is AdamW", f"{_O}.optimizer", off=(None, "adam", "adamw", "Adam", "AdamW"), objective=True),
    lost("the cosine falls once", f"{_O}.num_cycles", off=(None, 0.5), objective=True),
    lost("the warm-up starts at 0", f"{_O}.lr_warmup_init", off=(None, 0)),
    lost("the weight decay stays as it is", f"{_O}.weight_decay_incr_style", off=(None, "constant")),
    combined(optimizer.critic,
             "critic.optimizer.lr, critic.optimizer.weight_decay, critic.optimizer.warmup_rollout_steps, critic.clip, "
             "critic.warmup_steps, critic.optimizer.schedule, critic.optimizer.beta1, critic.optimizer.beta2, "
             "critic.optimizer.clip_grad", "critic.*", "trainer.critic_warmup"),
)  # fmt: skip
_OBSERVED = (
    combined(data.evaluation,
             "eval.sets, eval.every, eval.at_start, eval.samples_per_prompt, eval.top_p, eval.top_k, eval.temperature",
             "data.val_files", "trainer.test_freq", "rollout.test_freq", "trainer.val_before_train", *data.VAL_KWARGS, f"{_R}.n_val",
             f"{_R}.val_temperature", "data.val_max_samples"),
    combined(run.checkpoints, "checkpoint.every, checkpoint.keep, checkpoint.resume", "trainer.save_freq",
             "trainer.max_actor_ckpt_to_keep", "trainer.resume_mode", "trainer.resume_from_path", "trainer.remove_previous_ckpt_in_save"),
    lost("checkpoints stay in output_dir; nearest: a folder that all nodes share", "trainer.default_hdfs_dir"),
    lost("training needs NVIDIA GPUs; nearest: leave it out", "trainer.device", off=(None, "cuda", "gpu")),
    lost("the workers' environment is not set; nearest: export it before the start", "ray_kwargs.ray_init.runtime_env.*",
         "ray_kwargs.ray_init.runtime_env"),
    combined(run.profile, "observe.profile_steps", "global_profiler.steps", "global_profiler.tool", "trainer.profile_steps"),
    combined(run.loggers, "observe.wandb_project, observe.mlflow_experiment, observe.swanlab_project, observe.tensorboard",
             "trainer.logger", "trainer.project_name"),
    combined(run.samples, "observe.samples_per_step, observe.eval_samples_per_set", "trainer.log_val_generations",
             "trainer.rollout_data_dir", "trainer.validation_data_dir"),
)  # fmt: skip
VERL = Table(
    dialect="verl",
    title="verl b178a3c (2026-01-29)",
    defaults=verl_defaults,
    rules=_RUN + _MODEL + _LAYOUT + _DATA + _ROLLOUT + _OBJECTIVE + _UPDATES + _OBSERVED + MEANINGLESS,
    optimises=_OPTIMISES,
)
"""In the order of our configuration."""
