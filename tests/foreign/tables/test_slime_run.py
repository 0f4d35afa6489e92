"""slime's runs in our words, by hand."""

from __future__ import annotations

from typing import Any

from tests.foreign.slime_runs import imported, ours


def losses(flags: dict[str, Any]) -> dict[str, bool]:
    return imported({"lr-decay-style": "constant", **flags}).losses


def test_length() -> None:
    assert ours({"num-epoch": 3})["num_rollout_steps"] == 5
    assert ours({"num-rollout": None, "num-epoch": 3})["num_epochs"] == 3
    assert list(imported({"num-rollout": None}).asked) == ["num_rollout_steps"]
    path = "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"
    filtered = imported({"num-rollout": None, "num-epoch": 3, "dynamic-sampling-filter-path": path})
    assert list(filtered.asked) == ["num_rollout_steps"], "its epochs are a number of steps; ours use every prompt once"


def test_samples_become_prompts() -> None:
    assert ours({"n-samples-per-prompt": 8, "global-batch-size": 32})["batch.mini_batch_prompts"] == 4
    assert ours({"num-steps-per-rollout": 2})["batch.mini_batch_prompts"] == 4
    assert ours({})["batch.mini_batch_prompts"] == 8, "Megatron: one sample per data-parallel rank, of 8"
    layout = {"tensor-model-parallel-size": 2, "context-parallel-size": 2, "actor-num-nodes": 2}
    assert (
        ours({**layout, "micro-batch-size": 3, "n-samples-per-prompt": 2})["batch.mini_batch_prompts"] == 6
    )  # 3 · 16 / 4 / 2
    assert "batch.mini_batch_prompts" in imported({**layout, "n-samples-per-prompt": 8}).asked
    assert "batch.mini_batch_prompts" in imported({"num-steps-per-rollout": 3}).asked
    assert "batch.mini_batch_prompts" in imported({"n-samples-per-prompt": 8, "global-batch-size": 30}).asked


def test_tokens_hold_the_longest_sequence() -> None:
    flags = {"rollout-max-prompt-len": 200, "use-dynamic-batch-size": True, "context-parallel-size": 2}
    assert ours({**flags, "max-tokens-per-gpu": 4096})["batch.max_tokens"] == 4096
    assert ours({**flags, "max-tokens-per-gpu": 500})["batch.max_tokens"] == 600
    assert ours({"rollout-max-prompt-len": 200, "micro-batch-size": 3})["batch.max_tokens"] == 3600


def test_sequence_parallelism_needs_tensor_parallelism() -> None:
    assert "parallel.sequence_parallel" not in ours({"sequence-parallel": True})
    assert ours({"sequence-parallel": True, "tensor-model-parallel-size": 2})["parallel.sequence_parallel"] is True


def test_limits_of_prompts() -> None:
    assert ours({})["data.on_long_prompt"] == "error", "slime cuts none"
    found = ours({"rollout-max-context-len": 4096})
    assert (found["data.max_prompt_tokens"], found["data.on_long_prompt"]) == (4095, "drop")
    assert ours({"rollout-max-context-len": 4096, "rollout-max-prompt-len": 100})["data.max_prompt_tokens"] == 100


def test_a_part_of_a_file() -> None:
    found = ours({"prompt-data": "/d.jsonl@[0:300]"})
    assert (found["data.files"], found["data.limit"]) == (["/d.jsonl"], 300)
    assert list(imported({"prompt-data": "/d.jsonl@[100:]"}).asked) == ["data.files"]


def test_quantized_folders_are_for_servers() -> None:
    conversion = imported({"hf-checkpoint": "/m/Qwen3-4B-FP8", "fp8-format": "e4m3", "fp8-recipe": "blockwise"})
    assert list(conversion.asked) == ["model.path"]
    found = {key: value for key, (value, _) in conversion.values().items()}
    assert (found["model.fp8.format"], found["model.fp8.recipe"]) == ("e4m3", "blockwise")


def test_schedule() -> None:
    found = ours({"lr-decay-style": "cosine", "lr-warmup-iters": 7, "lr-decay-iters": 90, "min-lr": 1e-7})
    assert (found["optimizer.warmup_updates"], found["optimizer.decay_updates"], found["optimizer.min_lr"]) == (
        7,
        90,
        1e-7,
    )
    share = {"lr-decay-style": "cosine", "lr-warmup-fraction": 0.1, "num-steps-per-rollout": 2}
    found = ours(share)  # 5 rollout steps of 2 gradient steps
    assert (found["optimizer.warmup_updates"], found["optimizer.decay_updates"]) == (1, 10)
    unknown = imported({**share, "num-rollout": None, "num-epoch": 1})
    assert {"optimizer.warmup_updates", "optimizer.decay_updates"} <= set(unknown.asked)


def test_evaluation() -> None:
    flags = {
        "eval-prompt-data": ["aime", "/a.jsonl", "math", "/b.jsonl"],
        "eval-interval": 5,
        "rollout-temperature": 0.8,
        "label-key": "y",
    }
    found = ours({**flags, "eval-max-response-len": 4096, "n-samples-per-eval-prompt": 4})
    assert found["eval.sets.aime.files"] == ["/a.jsonl"]
    assert found["eval.sets.math.answer_key"] == "y"
    assert (found["eval.temperature"], found["eval.samples_per_prompt"], found["eval.max_response_tokens"]) == (
        0.8,
        4,
        4096,
    )
    assert (found["eval.every"], found["eval.at_start"]) == (5, True)
    assert "eval.every" not in ours({"eval-prompt-data": ["aime", "/a.jsonl"]})
    assert found["eval.sets.aime.on_long_prompt"] == "error"
    thinking = {"apply-chat-template": True, "apply-chat-template-kwargs": {"enable_thinking": False}}
    asked = ours({**flags, **thinking})
    assert (
        asked["eval.sets.aime.chat_template_kwargs"] == asked["data.chat_template_kwargs"] == {"enable_thinking": False}
    )
    assert "data.chat_template_kwargs" not in ours({**thinking, "apply-chat-template": None})
    limited = ours({**flags, "eval-prompt-data": ["aime.24", "/a.jsonl@[:30]"], "eval-max-prompt-len": 700})
    names = ("files", "limit", "max_prompt_tokens", "on_long_prompt")
    assert [limited[f"eval.sets.aime_24.{name}"] for name in names] == [["/a.jsonl"], 30, 700, "drop"]


def test_megatrons_own_default_schedule_is_told() -> None:
    assert imported({}).losses == {"lr-decay-style": False}
