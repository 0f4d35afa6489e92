"""Scripts in the style of verl's users, written for these tests: their settings are facts, their lines are ours."""

from __future__ import annotations

DAPO_32B = r"""#!/usr/bin/env bash
set -euo pipefail

# the published run on 16 nodes of 8 GPUs
prompt_len=$((2 * 1024))
answer_len=$((20 * 1024))
whole_len=$((prompt_len + answer_len))
groups=512
HOME_OF_DATA=${HOME_OF_DATA:-"${HOME}/verl"}
TRAIN=(
    data.train_files="${HOME_OF_DATA}/data/dapo-math-17k.parquet"
    data.val_files="${HOME_OF_DATA}/data/aime-2024.parquet"
    data.prompt_key=prompt
    data.truncation='left'
    data.max_prompt_length=${prompt_len}
    data.max_response_length=${answer_len}
    data.train_batch_size=${groups}
    data.gen_batch_size=$((groups * 3))
)
ray job submit --address="${RAY_ADDRESS:-http://localhost:8265}" -- python3 -m recipe.dapo.main_dapo "${TRAIN[@]}" \
    algorithm.adv_estimator=grpo algorithm.use_kl_in_reward=False algorithm.kl_ctrl.kl_coef=0.0 \
    algorithm.filter_groups.enable=True algorithm.filter_groups.metric=acc algorithm.filter_groups.max_num_gen_batches=10 \
    actor_rollout_ref.model.path="${MODEL:-${HOME_OF_DATA}/models/Qwen2.5-32B}" \
    actor_rollout_ref.model.use_remove_padding=True actor_rollout_ref.model.enable_gradient_checkpointing=True \
    actor_rollout_ref.actor.use_kl_loss=False actor_rollout_ref.actor.kl_loss_coef=0.0 \
    actor_rollout_ref.actor.clip_ratio_low=0.2 actor_rollout_ref.actor.clip_ratio_high=0.28 \
    actor_rollout_ref.actor.clip_ratio_c=10.0 actor_rollout_ref.actor.loss_agg_mode=token-mean \
    actor_rollout_ref.actor.entropy_coeff=0 actor_rollout_ref.actor.grad_clip=1.0 \
    actor_rollout_ref.actor.use_dynamic_bsz=True actor_rollout_ref.actor.ppo_max_token_len_per_gpu=${whole_len} \
    actor_rollout_ref.actor.ppo_mini_batch_size=32 actor_rollout_ref.actor.ulysses_sequence_parallel_size=8 \
    actor_rollout_ref.actor.fsdp_config.param_offload=True actor_rollout_ref.actor.fsdp_config.optimizer_offload=True \
    actor_rollout_ref.actor.optim.lr=1e-6 actor_rollout_ref.actor.optim.lr_warmup_steps=10 \
    actor_rollout_ref.actor.optim.weight_decay=0.1 \
    actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.n=16 actor_rollout_ref.rollout.gpu_memory_utilization=0.80 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=4 actor_rollout_ref.rollout.temperature=1.0 \
    actor_rollout_ref.rollout.top_p=1.0 actor_rollout_ref.rollout.top_k=-1 \
    actor_rollout_ref.rollout.max_num_batched_tokens=${whole_len} \
    actor_rollout_ref.rollout.val_kwargs.temperature=1.0 actor_rollout_ref.rollout.val_kwargs.top_p=0.7 \
    actor_rollout_ref.rollout.val_kwargs.do_sample=True actor_rollout_ref.rollout.val_kwargs.n=1 \
    reward_model.reward_manager=dapo reward_model.overlong_buffer.enable=True \
    reward_model.overlong_buffer.len=$((4 * 1024)) reward_model.overlong_buffer.penalty_factor=1.0 \
    trainer.logger='["console","wandb"]' trainer.project_name=DAPO trainer.experiment_name=DAPO-Qwen2.5-32B \
    trainer.default_local_dir="${CKPTS:-${HOME_OF_DATA}/ckpts/DAPO/DAPO-Qwen2.5-32B}" \
    trainer.nnodes=16 trainer.n_gpus_per_node=8 trainer.test_freq=5 trainer.save_freq=5 trainer.total_epochs=1
"""
"""What run_dapo_qwen2.5_32b.sh of verl-recipe 48ea0a7 sets, as far as it means something here."""

ADDITION = r"""#!/bin/bash
# two-digit addition on one GPU
set -x
export WANDB_API_KEY=not-to-be-copied
touch /tmp/dapo_mcore_import_ran || exit 9
ROWS=${ROWS:-data/addition}

python3 -m verl.trainer.main_ppo --config-name=ppo_trainer \
    algorithm.adv_estimator=grpo \
    data.train_files="['$ROWS/train.parquet']" \
    data.val_files=$ROWS/heldout.parquet \
    data.max_prompt_length=8 \
    data.max_response_length=48 \
    data.train_batch_size=32 \
    actor_rollout_ref.model.path=tiny/addition \
    actor_rollout_ref.actor.ppo_mini_batch_size=8 \
    actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=4096 \
    actor_rollout_ref.actor.use_kl_loss=False \
    actor_rollout_ref.actor.clip_ratio_high=0.28 \
    actor_rollout_ref.actor.optim.lr=3e-4 \
    actor_rollout_ref.actor.optim.lr_warmup_steps=5 \
    actor_rollout_ref.actor.optim.weight_decay=0.0 \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=16 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
    actor_rollout_ref.rollout.val_kwargs.n=8 \
    actor_rollout_ref.rollout.val_kwargs.temperature=1.0 \
    actor_rollout_ref.rollout.val_kwargs.do_sample=True \
    trainer.n_gpus_per_node=1 \
    trainer.nnodes=1 \
    trainer.logger=console \
    trainer.experiment_name=addition \
    trainer.test_freq=10 \
    trainer.total_training_steps=60 $@
"""
"""A run that learns in minutes on a CPU once its model and data are those of examples/arithmetic.py."""
