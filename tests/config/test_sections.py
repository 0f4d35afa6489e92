"""Defaults, and rules inside one section."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from dapo_mcore.config.sections import CheckpointConfig, RolloutConfig


def test_top_k_draws_from_all_tokens_or_from_at_least_one() -> None:
    assert [RolloutConfig(top_k=k).top_k for k in (-1, 1)] == [-1, 1]
    with pytest.raises(ValidationError, match="top_k 0 leaves no token to draw"):
        RolloutConfig(top_k=0)


def test_a_response_ends_at_texts_and_token_ids() -> None:
    assert RolloutConfig(stop=["</answer>", 7]).stop == ["</answer>", 7] and RolloutConfig(stop="\n\n").stop == ["\n\n"]
    with pytest.raises(
        ValidationError, match="at most 32 texts and ids end a response, as on SGLang servers; there are 33"
    ):
        RolloutConfig(stop=list(range(33)))


def test_only_checkpoints_during_training_are_written_beside_it() -> None:
    assert CheckpointConfig(every=5, async_save=True).async_save and not CheckpointConfig(every=5).async_save
    with pytest.raises(
        ValidationError, match="async_save is for the checkpoints of every, which is null: set every, or"
    ):
        CheckpointConfig(async_save=True)
