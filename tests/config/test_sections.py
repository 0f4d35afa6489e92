"""Defaults, and rules inside one section."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from dapo_mcore.config.file import load_config
from dapo_mcore.config.sections import CheckpointConfig, DataConfig, RewardConfig, RolloutConfig


def test_a_minimal_file_gets_the_papers_defaults(file: Path) -> None:
    config = load_config(file)
    assert (config.algo.clip_low, config.algo.clip_high, config.algo.dual_clip) == (0.2, 0.28, None)
    assert config.algo.loss_mode == "token-mean"
    assert config.run_dir == Path("runs/run")


def test_a_reward_function_that_may_hang_gets_a_worker_by_default() -> None:
    workers = {"math_dapo": 0, "math_verify": 1, "my.module:f": 1}
    assert {name: RewardConfig(function=name).num_workers for name in workers} == workers
    assert RewardConfig(function="my.module:f", workers=0).num_workers == 0


def test_a_prompt_is_plain_text_or_a_chat() -> None:
    assert DataConfig(files="a", system_prompt="S", chat_template=True).files == ["a"]
    with pytest.raises(ValidationError, match="system_prompt needs a chat template"):
        DataConfig(files="a", system_prompt="S")
    with pytest.raises(ValidationError, match="a chat template writes its own BOS: set add_bos false"):
        DataConfig(files="a", chat_template=True, add_bos=True)


def test_top_k_draws_from_all_tokens_or_from_at_least_one() -> None:
    assert [RolloutConfig(top_k=k).top_k for k in (-1, 1)] == [-1, 1]
    with pytest.raises(ValidationError, match="top_k 0 leaves no token to draw"):
        RolloutConfig(top_k=0)


def test_math_verify_never_runs_without_a_deadline():
    assert RewardConfig(function="math_verify").num_workers == 1
    with pytest.raises(ValidationError, match="math_verify needs workers of at least 1"):
        RewardConfig(function="math_verify", workers=0)
    with pytest.raises(ValidationError, match="strict_box is a form of function math_dapo"):
        RewardConfig(function="math_verify", strict_box=True)


def test_a_cluster_of_reward_workers_needs_workers():
    with pytest.raises(ValidationError, match="placement ray needs workers of at least 1"):
        RewardConfig(placement="ray")


def test_only_checkpoints_during_training_are_written_beside_it() -> None:
    assert CheckpointConfig(every=5, async_save=True).async_save and not CheckpointConfig(every=5).async_save
    with pytest.raises(
        ValidationError, match="async_save is for the checkpoints of every, which is null: set every, or"
    ):
        CheckpointConfig(async_save=True)
