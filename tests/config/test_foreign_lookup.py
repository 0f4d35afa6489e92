"""What is found for a foreign name that stands where a key of ours belongs."""

from __future__ import annotations

import pytest

from dapo_mcore.config.foreign_lookup import foreign, meant_by, unknown_arguments


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("actor_rollout_ref.rollout.n", "verl's name for rollout.group_size (responses per prompt)"),
        ("+actor_rollout_ref.rollout.n", "verl's name for rollout.group_size (responses per prompt)"),
        ("rollout.n", "verl's name for rollout.group_size (responses per prompt)"),
        ("trainer.test_freq", "verl's name for eval.every (rollout steps; -1 (never): null)"),
        (
            "algorithm.adv_estimator",
            "verl's name for algo.advantage, algo.advantage_std and algo.advantage_baseline (grpo: group; gae: gae with a critic; "
            "rloo: group with advantage_baseline leave-one-out and advantage_std none)",
        ),
        ("--rollout-batch-size", "slime's name for sampling.train_batch_prompts (prompts per rollout step)"),
        ("rollout_batch_size", "slime's name for sampling.train_batch_prompts (prompts per rollout step)"),
    ],
)
def test_a_foreign_name_is_told_with_our_key_and_its_unit(written: str, told: str) -> None:
    assert str(foreign(written)) == told


@pytest.mark.parametrize("written", ["rollout.group_sise", "n", "lower", ""])
def test_no_foreign_name_is_guessed_from_a_single_word(written: str) -> None:
    assert foreign(written) is None


def test_the_last_part_of_a_foreign_key_finds_ours() -> None:
    assert meant_by("n") == ["rollout.group_size", "eval.samples_per_prompt"]
    assert meant_by("ppo_mini_batch_size") == ["batch.mini_batch_prompts"]
    assert meant_by("tensor_model_parallel_size") == ["parallel.tensor_parallel", "rollout.sglang.tensor_parallel"]
    assert meant_by("no_such_name") == []


def test_a_foreign_flag_on_the_command_line() -> None:
    assert (
        unknown_arguments(["--rollout-batch-size", "32"])
        == "--rollout-batch-size is slime's name for sampling.train_batch_prompts (prompts per rollout step); write "
        "sampling.train_batch_prompts=VALUE"
    )
    assert unknown_arguments(["--procesess", "2"]) == "unrecognized arguments: --procesess 2"
    assert unknown_arguments(["--rolout-batch-size", "32"]).endswith(
        " --rolout-batch-size 32; did you mean --rollout-batch-size, slime's name for sampling.train_batch_prompts (prompts per "
        "rollout step)?"
    )
