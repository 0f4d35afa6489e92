"""The defaults of verl that the table reads, as of commit b178a3c (2026-01-29), by the program and configuration of a run.

Change here: a default of verl, with the version it is from. Sources: verl/trainer/config/*.yaml as its _generated_ppo_trainer.yaml
and _generated_ppo_megatron_trainer.yaml resolve them, and dapo/config/dapo_trainer.yaml of verl-recipe 48ea0a7.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dapo_mcore.foreign.settings import ForeignRun

_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
_CORRECTION = "algorithm.rollout_correction"

_COMMON: Mapping[str, Any] = {
    "data.val_files": "~/data/rlhf/gsm8k/test.parquet",
    "data.prompt_key": "prompt",
    "data.reward_fn_key": "data_source",
    "data.max_prompt_length": 512,
    "data.max_response_length": 512,
    "data.train_batch_size": 1024,
    "data.truncation": "error",
    "data.filter_overlong_prompts": False,
    "data.shuffle": True,
    "data.train_max_samples": -1,
    "data.val_max_samples": -1,
    "actor_rollout_ref.model.enable_gradient_checkpointing": True,
    "actor_rollout_ref.hybrid_engine": True,
    f"{_ACTOR}.ppo_mini_batch_size": 256,
    f"{_ACTOR}.use_dynamic_bsz": False,
    f"{_ACTOR}.ppo_max_token_len_per_gpu": 16384,
    f"{_ACTOR}.clip_ratio": 0.2,
    f"{_ACTOR}.clip_ratio_low": 0.2,
    f"{_ACTOR}.clip_ratio_high": 0.2,
    f"{_ACTOR}.clip_ratio_c": 3.0,
    f"{_ACTOR}.loss_agg_mode": "token-mean",
    f"{_ACTOR}.policy_loss.loss_mode": "vanilla",
    f"{_ACTOR}.policy_loss.kl_cov_ratio": 0.0002,
    f"{_ACTOR}.policy_loss.ppo_kl_coef": 0.1,
    f"{_ACTOR}.policy_loss.clip_cov_ratio": 0.0002,
    f"{_ACTOR}.policy_loss.clip_cov_lb": 1.0,
    f"{_ACTOR}.policy_loss.clip_cov_ub": 5.0,
    f"{_ACTOR}.entropy_coeff": 0,
    f"{_ACTOR}.use_kl_loss": False,
    f"{_ACTOR}.kl_loss_coef": 0.001,
    f"{_ACTOR}.kl_loss_type": "low_var_kl",
    f"{_ACTOR}.ppo_epochs": 1,
    f"{_ACTOR}.shuffle": False,
    f"{_ACTOR}.optim.lr": 1e-6,
    f"{_ACTOR}.optim.lr_warmup_steps": -1,
    f"{_ACTOR}.optim.lr_warmup_steps_ratio": 0.0,
    f"{_ACTOR}.optim.weight_decay": 0.01,
    f"{_ACTOR}.optim.betas": [0.9, 0.999],
    f"{_ROLLOUT}.n": 1,
    f"{_ROLLOUT}.temperature": 1.0,
    f"{_ROLLOUT}.top_p": 1.0,
    f"{_ROLLOUT}.top_k": -1,
    f"{_ROLLOUT}.tensor_model_parallel_size": 2,
    f"{_ROLLOUT}.gpu_memory_utilization": 0.5,
    f"{_ROLLOUT}.val_kwargs.n": 1,
    f"{_ROLLOUT}.val_kwargs.temperature": 0,
    f"{_ROLLOUT}.val_kwargs.top_p": 1.0,
    f"{_ROLLOUT}.val_kwargs.top_k": -1,
    f"{_ROLLOUT}.val_kwargs.do_sample": False,
    f"{_ROLLOUT}.multi_turn.enable": False,
    f"{_ROLLOUT}.calculate_log_probs": False,
    "algorithm.adv_estimator": "gae",
    "algorithm.norm_adv_by_std_in_grpo": True,
    "algorithm.gamma": 1.0,
    "algorithm.lam": 1.0,
    "algorithm.use_kl_in_reward": False,
    "algorithm.kl_penalty": "kl",
    "algorithm.kl_ctrl.type": "fixed",
    "algorithm.kl_ctrl.kl_coef": 0.001,
    f"{_CORRECTION}.rollout_is_threshold": 2.0,
    f"{_CORRECTION}.bypass_mode": False,
    f"{_CORRECTION}.loss_type": "ppo_clip",
    f"{_CORRECTION}.rollout_is_batch_normalize": False,
    "reward_model.reward_manager": "naive",
    "custom_reward_function.name": "compute_score",
    "critic.optim.lr": 1e-5,
    "critic.optim.weight_decay": 0.01,
    "critic.optim.lr_warmup_steps": -1,
    "critic.optim.lr_warmup_steps_ratio": 0.0,
    "critic.optim.betas": [0.9, 0.999],
    "critic.optim.clip_grad": 1.0,
    "critic.cliprange_value": 0.5,
    "trainer.critic_warmup": 0,
    "trainer.use_legacy_worker_impl": "auto",
    "trainer.nnodes": 1,
    "trainer.n_gpus_per_node": 8,
    "trainer.total_epochs": 30,
    "trainer.test_freq": -1,
    "trainer.val_before_train": True,
    "trainer.save_freq": -1,
    "trainer.resume_mode": "auto",
    "trainer.experiment_name": "gsm8k",
    "trainer.project_name": "verl_examples",
    "trainer.logger": ["console", "wandb"],
}
"""Without the model and the training files, for which verl has placeholders."""
_FSDP: Mapping[str, Any] = {
    f"{_ACTOR}.strategy": "fsdp",
    f"{_ACTOR}.grad_clip": 1.0,
    f"{_ACTOR}.optim.clip_grad": 1.0,
    "critic.grad_clip": 1.0,
    "critic.optim.lr_scheduler_type": "constant",
    "critic.optim.min_lr_ratio": 0.0,
    f"{_ACTOR}.optim.lr_scheduler_type": "constant",
    f"{_ACTOR}.optim.min_lr_ratio": 0.0,
    f"{_ACTOR}.ulysses_sequence_parallel_size": 1,
    "actor_rollout_ref.model.use_remove_padding": True,
}
_MEGATRON: Mapping[str, Any] = {
    f"{_ACTOR}.strategy": "megatron",
    f"{_ACTOR}.optim.clip_grad": 1.0,
    f"{_ACTOR}.optim.lr_decay_style": "constant",
    f"{_ACTOR}.optim.min_lr": 0.0,
    "critic.optim.lr_decay_style": "constant",
    "critic.optim.min_lr": 0.0,
    f"{_ACTOR}.megatron.tensor_model_parallel_size": 1,
    f"{_ACTOR}.megatron.pipeline_model_parallel_size": 1,
    f"{_ACTOR}.megatron.context_parallel_size": 1,
    f"{_ACTOR}.megatron.expert_model_parallel_size": 1,
    f"{_ACTOR}.megatron.sequence_parallel": True,
}
_RECIPE: Mapping[str, Any] = {
    "reward_model.reward_manager": "dapo",
    "reward_model.overlong_buffer.enable": False,
    "reward_model.overlong_buffer.len": 0,
    "reward_model.overlong_buffer.penalty_factor": 0.0,
    "algorithm.filter_groups.enable": False,
    "algorithm.filter_groups.max_num_gen_batches": 0,
    "trainer.project_name": "verl-dapo",
}
_ONE_STEP_OFF: Mapping[str, Any] = {
    "rollout.nnodes": 1,
    "rollout.n_gpus_per_node": 8,
    f"{_ROLLOUT}.calculate_log_probs": True,
    f"{_CORRECTION}.bypass_mode": True,
}
"""verl/experimental/one_step_off_policy/config/*.yaml."""
_FULLY_ASYNC: Mapping[str, Any] = {
    "rollout.nnodes": 1,
    "rollout.n_gpus_per_node": 8,
    "rollout.total_rollout_steps": 100,
    "rollout.test_freq": 1,
    "async_training.trigger_parameter_sync_step": 4,
    "async_training.require_batches": 1,
}
"""verl/experimental/fully_async_policy/config/*.yaml."""


def is_megatron(run: ForeignRun) -> bool:
    """Return True if Megatron trains: the run says so, names its configuration, or sets its parallel sizes."""
    settings = run.by_key()
    strategy = settings.get(f"{_ACTOR}.strategy")
    if strategy is not None:
        return strategy.value == "megatron"
    return "megatron" in run.config or any(key.startswith(f"{_ACTOR}.megatron.") for key in settings)


def is_fully_async(run: ForeignRun) -> bool:
    """Return True for verl's program that generates and trains at once, without rollout steps."""
    return "fully_async" in run.entry


def verl_defaults(run: ForeignRun) -> dict[str, Any]:
    """Return {key: default} for the run's program (main_ppo, the recipe's main_dapo) and training backend."""
    own: dict[str, Any] = {}
    for part, defaults in {"dapo": _RECIPE, "one_step_off": _ONE_STEP_OFF, "fully_async": _FULLY_ASYNC}.items():
        own |= defaults if part in run.entry or part in run.config else {}
    return {**_COMMON, **(_MEGATRON if is_megatron(run) else _FSDP), **own}
