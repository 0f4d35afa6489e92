"""What follows from the numbers of a configuration, by hand."""

from __future__ import annotations

from typing import Any

from dapo_mcore.config.file import parse_config
from dapo_mcore.config.follows import describe_evaluation, describe_units


def config(**sections: Any) -> Any:
    """12 prompts × 5 a step in 3 gradient steps of 4 prompts."""
    tree = {
        "model": {"path": "m"},
        "data": {"files": ["t.jsonl"], "max_prompt_tokens": 100},
        "rollout": {"group_size": 5, "max_response_tokens": 900},
        "sampling": {"train_batch_prompts": 12},
        "batch": {"mini_batch_samples": 20},
    }
    return parse_config({**tree, **sections})


def test_updates_tokens_and_the_schedule_are_told_in_both_units():
    made = config(optimizer={"warmup_rollout_steps": 10, "schedule": "cosine", "decay_updates": 150, "min_lr": 1e-7})
    assert describe_units(made) == [
        "an update trains on 4 prompts × 5 = 20 samples of at most 1,000 tokens, prompt included: up to 20,000 tokens",
        "learning rate: 1e-06 after a warm-up of 30 updates (10 rollout steps), at 1e-07 after 150 updates (50 rollout steps)",
        "the cosine ends after 50 of 100 rollout steps",
    ]
    short = config(optimizer={"schedule": "cosine", "decay_rollout_steps": 51}, num_rollout_steps=50)
    assert describe_units(short)[2] == (
        "the cosine of 51 rollout steps is longer than the run of 50 rollout steps, which ends above min_lr"
    )
    assert describe_units(config())[1] == "learning rate: 1e-06 after a warm-up of 10 updates (3.333 rollout steps)"


def test_the_critic_has_a_schedule_of_its_own():
    made = config(algo={"advantage": "gae"}, critic={"optimizer": {"warmup_rollout_steps": 2}})
    assert (
        describe_units(made)[2] == "learning rate of the critic: 1e-05 after a warm-up of 6 updates (2 rollout steps)"
    )


def test_servers_and_their_gpus_are_told():
    def told(**sglang: Any) -> str:
        rollout = {"engine": "sglang", "group_size": 5, "max_response_tokens": 900, "sglang": sglang}
        return describe_units(config(rollout=rollout))[-1]

    assert told(num_servers=4, tensor_parallel=2) == "servers: 4 × tensor_parallel 2 = 8 GPUs"
    assert told(colocated=True, sync="tensor").endswith("1 × tensor_parallel 1 = 1 GPUs, shared with the trainer")
    assert told(urls=["http://a:1", "http://b:1"]) == "servers: 2, which run already"


def test_samples_of_an_evaluation_are_counted():
    sets = {"aime": {"files": ["a.jsonl"], "samples_per_prompt": 32}, "gsm8k": {"files": ["g.jsonl"]}}
    made = config(eval={"sets": sets, "samples_per_prompt": 2, "every": 7})
    counts = {"aime": 30, "gsm8k": 1000}
    assert describe_evaluation(made, counts) == [
        "evaluation every 7 rollout steps, before the first step and after the last: aime 30 prompts × 32 = 960; gsm8k 1,000 prompts "
        "× 2 = 2,000; together 2,960 samples"
    ]
    (cut,) = describe_evaluation(made, counts, most=1000)
    assert "gsm8k at least 1,000 prompts" in cut and cut.endswith("together at least 2,960 samples")
    assert describe_evaluation(config(), {}) == []
    (seldom,) = describe_evaluation(config(eval={"sets": sets, "every": None}), counts)
    assert seldom.startswith("evaluation before the first step and after the last: aime")
    (last,) = describe_evaluation(config(eval={"sets": sets, "every": None, "at_start": False}), counts)
    assert last.startswith("evaluation after the last: aime")
