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


def test_samples_become_prompts() -> None:
    assert ours({"n-samples-per-prompt": 8, "global-batch-size": 32})["batch.mini_batch_prompts"] == 4
    assert ours({"num-steps-per-rollout": 2})["batch.mini_batch_prompts"] == 4
    assert ours({})["batch.mini_batch_prompts"] == 8
    assert "batch.mini_batch_prompts" in imported({"n-samples-per-prompt": 8, "global-batch-size": 30}).asked


def test_tokens_hold_the_longest_sequence() -> None:
    flags = {"rollout-max-prompt-len": 200, "use-dynamic-batch-size": True, "context-parallel-size": 2}
    assert ours({**flags, "max-tokens-per-gpu": 4096})["batch.max_tokens"] == 4096
    assert ours({**flags, "max-tokens-per-gpu": 500})["batch.max_tokens"] == 600
    assert ours({"rollout-max-prompt-len": 200, "micro-batch-size": 3})["batch.max_tokens"] == 3600


def test_servers() -> None:
    flags = {"actor-num-nodes": 2, "actor-num-gpus-per-node": 8, "rollout-num-gpus-per-engine": 4}
    found = ours(flags)
    assert (found["rollout.sglang.num_servers"], found["rollout.sglang.tensor_parallel"]) == (4, 4)
    assert (found["rollout.sglang.sync"], found["rollout.sglang.placement"]) == ("tensor", "nodes")
    apart = ours({**flags, "colocate": None, "rollout-num-gpus": 8})
    assert (apart["rollout.sglang.num_servers"], apart["rollout.sglang.sync"]) == (2, "distributed")
    assert set(imported({**flags, "rollout-num-gpus-per-engine": 16}).asked) == {
        "rollout.sglang.tensor_parallel", "rollout.sglang.num_servers",
    }  # fmt: skip
    ahead = imported({"colocate": None}, "train_async.py")
    assert ahead.values()["rollout.async_steps"][0] == 1
    assert list(ahead.asked) == ["algo.tis.mode"]


def test_schedule() -> None:
    found = ours({"lr-decay-style": "cosine", "lr-warmup-iters": 7, "lr-decay-iters": 90, "min-lr": 1e-7})
    assert (found["optimizer.warmup_updates"], found["optimizer.decay_updates"], found["optimizer.min_lr"]) == (
        7,
        90,
        1e-7,
    )


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


def test_servers_options_and_stops() -> None:
    found = ours(
        {
            "sglang-mem-fraction-static": 0.7,
            "sglang-cuda-graph-bs": [1, 2],
            "rollout-stop": ["x"],
            "rollout-stop-token-ids": [7],
        }
    )
    assert found["rollout.sglang.server_args"] == {"mem-fraction-static": 0.7, "cuda-graph-bs": [1, 2]}
    assert found["rollout.stop"] == ["x", 7]


def test_megatrons_own_default_schedule_is_told() -> None:
    assert imported({}).losses == {"lr-decay-style": False}
