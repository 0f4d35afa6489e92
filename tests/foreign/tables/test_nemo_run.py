"""NeMo-RL's runs in our words, by hand."""

from __future__ import annotations

from tests.foreign.nemo_runs import imported, ours

MEGATRON = {"policy.megatron_cfg.enabled": True}


def test_length() -> None:
    assert ours({"grpo.max_num_epochs": 3})["num_epochs"] == 3
    assert "num_rollout_steps" in imported({"grpo.max_num_steps": 500}).asked


def test_limits_of_prompts_and_responses() -> None:
    limits = {"data.max_input_seq_length": 200, "policy.max_total_sequence_length": 1000}
    found = ours(limits)
    assert (found["data.max_prompt_tokens"], found["rollout.max_response_tokens"]) == (200, 800)
    assert ours({**limits, "policy.generation.max_new_tokens": 500})["rollout.max_response_tokens"] == 500
    assert {"data.max_prompt_tokens", "rollout.max_response_tokens"} <= set(imported({}).asked)


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
    assert "parallel.tensor_parallel" in imported({"policy.dtensor_cfg.tensor_parallel_size": 2}).asked


def test_optimizers() -> None:
    linear = [
        {"name": "torch.optim.lr_scheduler.LinearLR", "kwargs": {"total_iters": 7}},
        {"name": "torch.optim.lr_scheduler.ConstantLR", "kwargs": {}},
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
    assert imported({"policy.scheduler": [{"name": "x.StepLR", "kwargs": {}}]}).losses["policy.scheduler"] is False


def test_servers() -> None:
    found = ours(
        {"cluster.num_nodes": 2, "cluster.gpus_per_node": 8, "policy.generation.vllm_cfg.tensor_parallel_size": 4}
    )
    assert (found["rollout.sglang.num_servers"], found["rollout.sglang.placement"], found["rollout.sglang.sync"]) == (
        4,
        "nodes",
        "tensor",
    )
    assert "rollout.sglang.num_servers" in imported({"policy.generation.colocated.enabled": False}).asked


def test_data_by_name_is_asked_for() -> None:
    assert "data.files" in imported({"data.train.dataset_name": "X"}).asked
    found = ours(
        {"data.train.data_path": "/d.jsonl", "data.train.input_key": "q", "data.validation.data_path": "/e.jsonl"}
    )
    assert (found["data.files"], found["data.prompt_key"], found["eval.sets.validation.files"]) == (
        ["/d.jsonl"],
        "q",
        ["/e.jsonl"],
    )
    assert imported({}).losses == {"data.default.prompt_file": True}, "the text around prompts is NeMo-RL's default"


def test_checkpoints_and_loggers() -> None:
    assert ours({"checkpointing.keep_top_k": 2})["checkpoint.keep_best"] == 2
    assert ours({"checkpointing.keep_top_k": None})["checkpoint.keep"] == 1_000_000
    assert ours({"checkpointing.enabled": False})["checkpoint.every"] is None
    found = ours({"logger.mlflow_enabled": True, "logger.mlflow.experiment_name": "e", "logger.wandb.project": "p"})
    assert found["observe.mlflow_experiment"] == "e"
    assert "observe.wandb_project" not in found


def test_stops_and_overrides() -> None:
    found = ours({"policy.generation.stop_strings": ["x"], "policy.hf_config_overrides.rope.factor": 4})
    assert found["rollout.stop"] == ["x"]
    assert found["model.overrides"] == {"rope": {"factor": 4}}


def test_a_list_of_data_sets_or_a_loader_of_ones_own_is_asked_for() -> None:
    for key, value in {"data.train": [{"data_path": "/a"}], "data.custom_dataloader": "mine.loader"}.items():
        conversion = imported({key: value, "data.train.data_path": "/d.jsonl"})
        assert conversion.kind_of(key) == "asked" and "data.files" in conversion.asked
