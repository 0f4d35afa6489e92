"""The defaults of NeMo-RL that the table reads, as of commit 7ea279a (2026-08-22).

Change here: a default of NeMo-RL, with the version it is from. Source: examples/configs/grpo_math_1B.yaml, with its references
to other keys resolved from the run's own values. A configuration that does not inherit from that file has the defaults of the
code (GRPOConfig in nemo_rl/algorithms/grpo.py, ClippedPGLossConfig in algorithms/loss/loss_functions.py), which are the same but
for keys that may be left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dapo_mcore.foreign.read.nemo import BASE
from dapo_mcore.foreign.settings import ForeignRun

_GENERATION, _MEGATRON = "policy.generation", "policy.megatron_cfg"
_DEFAULTS: Mapping[str, Any] = {
    "grpo.num_prompts_per_step": 32,
    "grpo.num_generations_per_prompt": 16,
    "grpo.max_num_epochs": 1,
    "grpo.max_num_steps": 1_000_000,
    "grpo.normalize_rewards": True,
    "grpo.use_leave_one_out_baseline": True,
    "grpo.val_period": 10,
    "grpo.val_at_start": False,
    "grpo.overlong_filtering": False,
    "grpo.max_val_samples": 256,
    "grpo.val_batch_size": 256,
    "grpo.val_num_generations_per_prompt": 1,
    "grpo.seed": 42,
    "grpo.use_dynamic_sampling": False,
    "grpo.dynamic_sampling_max_gen_batches": 10,
    "grpo.batch_multiplier": 1,
    "grpo.reward_shaping.enabled": False,
    "grpo.reward_shaping.overlong_buffer_length": 128,
    "grpo.reward_shaping.overlong_buffer_penalty": 1,
    "grpo.adv_estimator.name": "grpo",
    "grpo.reward_scaling.enabled": False,
    "grpo.reward_scaling.source_min": 0.0,
    "grpo.reward_scaling.source_max": 1.0,
    "grpo.reward_scaling.target_min": 0.0,
    "grpo.reward_scaling.target_max": 1.0,
    "grpo.async_grpo.max_trajectory_age_steps": 1,
    "loss_fn.reference_policy_kl_penalty": 0.01,
    "loss_fn.reference_policy_kl_type": "k3",
    "loss_fn.kl_output_clamp_value": 10.0,
    "loss_fn.ratio_clip_min": 0.2,
    "loss_fn.ratio_clip_max": 0.2,
    "loss_fn.token_level_loss": True,
    "loss_fn.positive_example_nll_weight": 0.0,
    "checkpointing.enabled": True,
    "checkpointing.checkpoint_dir": "results/grpo",
    "checkpointing.metric_name": "val:accuracy",
    "checkpointing.higher_is_better": True,
    "checkpointing.keep_top_k": 3,
    "checkpointing.save_period": 10,
    "policy.model_name": "Qwen/Qwen2.5-1.5B",
    "policy.train_global_batch_size": 512,
    "policy.train_micro_batch_size": 4,
    "policy.max_total_sequence_length": 512,
    "policy.precision": "bfloat16",
    "policy.max_grad_norm": 1.0,
    "policy.optimizer.kwargs.lr": 5e-6,
    "policy.optimizer.kwargs.weight_decay": 0.01,
    "policy.optimizer.kwargs.betas": [0.9, 0.999],
    "policy.sequence_packing.enabled": True,
    "policy.optimizer.kwargs.eps": 1e-8,
    "policy.scheduler": [
        {"name": "torch.optim.lr_scheduler.LinearLR", "kwargs": {"start_factor": 0.1, "total_iters": 50}},
        {"name": "torch.optim.lr_scheduler.ConstantLR", "kwargs": {"factor": 1.0}},
        {"milestones": [50]},
    ],
    f"{_MEGATRON}.tensor_model_parallel_size": 1,
    f"{_MEGATRON}.pipeline_model_parallel_size": 1,
    f"{_MEGATRON}.context_parallel_size": 1,
    f"{_MEGATRON}.expert_model_parallel_size": 1,
    f"{_MEGATRON}.expert_tensor_parallel_size": 1,
    f"{_MEGATRON}.optimizer.lr": 5e-6,
    f"{_MEGATRON}.optimizer.min_lr": 5e-7,
    f"{_MEGATRON}.optimizer.weight_decay": 0.01,
    f"{_MEGATRON}.optimizer.adam_beta1": 0.9,
    f"{_MEGATRON}.optimizer.adam_beta2": 0.999,
    f"{_MEGATRON}.optimizer.adam_eps": 1e-8,
    f"{_MEGATRON}.freeze_moe_router": True,
    f"{_MEGATRON}.moe_router_load_balancing_type": "none",
    f"{_MEGATRON}.moe_router_bias_update_rate": 0.0,
    f"{_MEGATRON}.scheduler.lr_decay_style": "constant",
    f"{_MEGATRON}.scheduler.lr_decay_iters": 1000,
    f"{_MEGATRON}.scheduler.lr_warmup_iters": 13,
    f"{_MEGATRON}.scheduler.lr_warmup_init": 5e-7,
    f"{_GENERATION}.temperature": 1.0,
    f"{_GENERATION}.top_p": 1.0,
    f"{_GENERATION}.vllm_cfg.tensor_parallel_size": 1,
    f"{_GENERATION}.vllm_cfg.gpu_memory_utilization": 0.6,
    f"{_GENERATION}.colocated.enabled": True,
    "data.shuffle": True,
    "data.train.dataset_name": "OpenMathInstruct-2",
    "data.train.split_validation_size": 0.05,
    "data.default.prompt_file": "examples/prompts/cot.txt",
    "env.math.num_workers": 8,
    "env.math.math_verify_impl": "hf_math_verify",
    "logger.wandb.project": "grpo-dev",
    "logger.mlflow.experiment_name": "grpo-dev",
    "logger.swanlab.project": "grpo-dev",
    "cluster.gpus_per_node": 1,
    "cluster.num_nodes": 1,
}
_ONLY_IN_BASE = (
    "data.default.prompt_file", "data.train.dataset_name", "data.train.split_validation_size", "policy.scheduler",
    "policy.max_grad_norm", f"{_MEGATRON}.freeze_moe_router",
)  # fmt: skip
"""Keys that a configuration may leave out: then it has none of this."""


def nemo_defaults(run: ForeignRun) -> Mapping[str, Any]:
    """Return the defaults of a run. Those that name another key have its value in the run."""
    given = {key: setting.value for key, setting in run.by_key().items()}
    whole = given.get("policy.max_total_sequence_length", _DEFAULTS["policy.max_total_sequence_length"])
    own = {"grpo.reward_shaping.max_response_length", "data.max_input_seq_length", f"{_GENERATION}.max_new_tokens"}
    left_out = set(_ONLY_IN_BASE) if run.config != BASE else set()
    if "data.default" in given:  # null: no defaults for data sets
        left_out.add("data.default.prompt_file")
    if "data.train" in given:  # a list of data sets
        left_out |= {"data.train.dataset_name", "data.train.split_validation_size"}
    return {key: value for key, value in {**_DEFAULTS, **dict.fromkeys(own, whole)}.items() if key not in left_out}
