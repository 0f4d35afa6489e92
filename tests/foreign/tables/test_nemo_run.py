"""NeMo-RL's runs in our words, by hand."""

from __future__ import annotations

from tests.foreign.nemo_runs import imported, ours

MEGATRON = {"policy.megatron_cfg.enabled": True}


def test_length() -> None:
    assert ours({"grpo.max_num_epochs": 3})["num_epochs"] == 3
    assert "num_rollout_steps" in imported({"grpo.max_num_steps": 500}).asked


def test_samples_become_prompts() -> None:
    found = ours(
        {"grpo.num_generations_per_prompt": 8, "policy.train_global_batch_size": 64, "grpo.num_prompts_per_step": 40}
    )
    assert (found["batch.mini_batch_prompts"], found["sampling.train_batch_prompts"], found["rollout.group_size"]) == (
        8,
        40,
        8,
    )
    filtered = ours({"grpo.use_dynamic_sampling": True, "grpo.batch_multiplier": 3, "grpo.num_prompts_per_step": 40})
    assert (filtered["sampling.style"], filtered["sampling.gen_batch_prompts"]) == ("filter", 120)
    assert "batch.mini_batch_prompts" in imported({"policy.train_global_batch_size": 100}).asked


def test_layouts() -> None:
    found = ours(
        {**MEGATRON, "policy.megatron_cfg.tensor_model_parallel_size": 4, "policy.megatron_cfg.sequence_parallel": True}
    )
    assert (found["parallel.tensor_parallel"], found["parallel.sequence_parallel"]) == (4, True)
    dtensor = imported({"policy.dtensor_cfg.tensor_parallel_size": 2, "policy.dtensor_cfg.cpu_offload": True})
    assert dtensor.asked["parallel.tensor_parallel"].sources == ("policy.dtensor_cfg.tensor_parallel_size",)
    assert dtensor.kind_of("policy.dtensor_cfg.cpu_offload") == "meaningless"


def test_optimizers() -> None:
    linear = [
        {"name": "torch.optim.lr_scheduler.LinearLR", "kwargs": {"total_iters": 7}},
        {"name": "torch.optim.lr_scheduler.ConstantLR", "kwargs": {"factor": 1.0}},
        {"milestones": [7]},
    ]
    found = ours({"policy.optimizer.kwargs.lr": 1e-6, "policy.scheduler": linear})
    assert (found["optimizer.lr"], found["optimizer.warmup_rollout_steps"], found["optimizer.beta2"]) == (
        1e-6,
        7,
        0.999,
    )
    cosine = {"policy.megatron_cfg.scheduler.lr_decay_style": "cosine", "policy.megatron_cfg.optimizer.lr": 2e-6}
    found = ours({**MEGATRON, **cosine})
    assert (found["optimizer.lr"], found["optimizer.schedule"], found["optimizer.decay_rollout_steps"]) == (
        2e-6,
        "cosine",
        1000,
    )
    for other in (
        {"name": "x.StepLR", "kwargs": {}},
        {"name": "x.ConstantLR", "kwargs": {}},
    ):  # torch's constant is a third of lr
        assert imported({"policy.scheduler": [other]}).losses["policy.scheduler"] is False
    assert imported({"policy.scheduler": [*linear[:2], {"milestones": [3]}]}).losses["policy.scheduler"] is False
    assert imported({"policy.scheduler.name": "x.StepLR"}).losses["policy.scheduler.name"] is False
    decay = {"name": "torch.optim.lr_scheduler.CosineAnnealingLR", "kwargs": {"T_max": 90, "eta_min": 1e-7}}
    found = ours({"policy.scheduler": [linear[0], decay, linear[2]]})
    names = ("schedule", "warmup_rollout_steps", "decay_rollout_steps", "min_lr")
    assert [found[f"optimizer.{name}"] for name in names] == ["cosine", 7, 97, 1e-7]


def test_clipping_and_eps() -> None:
    found = ours({"policy.max_grad_norm": None, "policy.optimizer.kwargs.eps": 1e-6})
    assert (found["optimizer.clip_grad"], found["optimizer.eps"]) == (0.0, 1e-6)
    own = {"policy.megatron_cfg.optimizer.clip_grad": 0.5, "policy.max_grad_norm": 2.0}
    assert (ours({**MEGATRON, **own})["optimizer.clip_grad"], ours(own)["optimizer.clip_grad"]) == (0.5, 2.0)


def test_what_megatrons_model_has_beside_its_weights() -> None:
    place = "policy.megatron_cfg"
    found = ours({**MEGATRON, f"{place}.fp8_cfg.enabled": True, f"{place}.fp8_cfg.fp8_recipe": "blockwise"})
    assert found["model.fp8.recipe"] == "blockwise"
    frozen = f"{place}.freeze_moe_router"
    assert frozen not in imported(MEGATRON).losses, "the model may have no experts"
    assert imported({**MEGATRON, f"{place}.expert_model_parallel_size": 8}).losses[frozen] is False
    for key, value in {"moe_router_load_balancing_type": "seq_aux_loss", "moe_router_bias_update_rate": 1e-3}.items():
        assert imported({**MEGATRON, f"{place}.{key}": value}).losses[f"{place}.{key}"] is True
    parts = {
        f"{place}.activation_checkpointing": True,
        f"{place}.recompute_granularity": "selective",
        f"{place}.recompute_modules": ["moe"],
    }
    assert ours({**MEGATRON, **parts})["model.recompute"] == ["moe"]


def test_tokens_of_packing() -> None:
    packed = {
        "policy.sequence_packing.train_mb_tokens": 9000,
        "policy.max_total_sequence_length": 4096,
        "policy.train_micro_batch_size": 2,
    }
    assert ours(packed)["batch.max_tokens"] == 9000
    assert ours({**packed, **MEGATRON, "policy.megatron_cfg.context_parallel_size": 2})["batch.max_tokens"] == 4500
    off = {**packed, "policy.sequence_packing.enabled": False}
    assert ours(off)["batch.max_tokens"] == 8192  # 2 samples
    assert (
        ours({**off, "policy.dynamic_batching.enabled": True, "policy.dynamic_batching.train_mb_tokens": 5000})[
            "batch.max_tokens"
        ]
        == 5000
    )


def test_a_filter_by_the_others_drops_single_responses() -> None:
    on = {"grpo.use_dynamic_sampling": True, "data.default.prompt_file": None}
    assert imported(on).losses == {"grpo.use_leave_one_out_baseline": True}
    assert imported({**on, "grpo.use_leave_one_out_baseline": False}).losses == {}


def test_checkpoints_and_loggers() -> None:
    best = ours(
        {
            "checkpointing.keep_top_k": 2,
            "data.validation.data_path": "/e.jsonl",
            "grpo.val_num_generations_per_prompt": 4,
        }
    )
    assert (best["checkpoint.keep_best"], best["checkpoint.best_metric"]) == (2, "val/validation/mean@4")
    repeated = {"data.validation.dataset_name": "AIME2024", "data.validation.repeat": 16}
    assert ours(repeated)["checkpoint.best_metric"] == "val/validation/mean@16"
    assert (
        "checkpoint.best_metric"
        in imported({"data.validation.data_path": "/e", "checkpointing.metric_name": "val:x"}).asked
    )
    assert ours({"checkpointing.keep_top_k": None})["checkpoint.keep"] is None
    assert ours({"checkpointing.enabled": False})["checkpoint.every"] is None
    found = ours({"logger.mlflow_enabled": True, "logger.mlflow.experiment_name": "e", "logger.wandb.project": "p"})
    assert found["observe.mlflow_experiment"] == "e"
    assert "observe.wandb_project" not in found


def test_stops_and_overrides() -> None:
    found = ours({"policy.generation.stop_strings": ["x"], "policy.hf_config_overrides.rope.factor": 4})
    assert found["rollout.stop"] == ["x"]
    assert found["model.overrides"] == {"rope": {"factor": 4}}
