"""Model folders that several tests read, each saved once by transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.weights.zoo import save_model

TEXTS = {"tokenizer.json": '{"version": "1.0"}', "tokenizer_config.json": "{}", "chat_template.jinja": "{{ messages }}"}


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """hf_folder(family, dtype, …) → a folder by transformers, with tokenizer files put beside. Do not write into it."""
    made: dict[Any, Path] = {}

    def folder_of(name: str, dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes: Any) -> Path:
        key = (name, dtype, shard, *changes.items())
        if key not in made:
            made[key] = save_model(tmp_path_factory.mktemp(name) / "hf", name, dtype, shard, **changes)
            for file, text in TEXTS.items():
                (made[key] / file).write_text(text)
        return made[key]

    return folder_of
