"""A configuration keeps the rules between its sections, and its settings alone do not."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from dapo_mcore.config.schema import Config
from dapo_mcore.config.settings import Settings

TREE = {"model": {"path": "model"}, "data": {"files": ["train.jsonl"]}, "batch": {"mini_batch_prompts": 30}}


def test_a_configuration_with_a_broken_rule_cannot_be_made() -> None:
    assert Settings(**TREE).batch.mini_batch_prompts == 30
    with pytest.raises(ValidationError, match="mini_batch_prompts 30 does not divide"):
        Config(**TREE)
