"""Prompts, evaluation sets and demonstrations: rules inside one section."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from dapo_mcore.config.data import DataConfig


def test_a_prompt_is_plain_text_or_a_chat() -> None:
    assert DataConfig(files="a", system_prompt="S", chat_template=True).files == ["a"]
    with pytest.raises(ValidationError, match="system_prompt needs a chat template"):
        DataConfig(files="a", system_prompt="S")
    with pytest.raises(ValidationError, match="a chat template writes its own BOS: set add_bos false"):
        DataConfig(files="a", chat_template=True, add_bos=True)
