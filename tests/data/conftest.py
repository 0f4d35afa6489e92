"""Prompt files and chat templates, written for one test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dapo_mcore.config.data import DataConfig
from dapo_mcore.data.prompts import PromptSet, load_prompts


@pytest.fixture
def load_file(tokenizer, tmp_path: Path) -> Callable[..., PromptSet]:
    """load_file(name, content, section, …) writes the file, unless content is None, and loads its prompts."""

    def load(name: str, content: bytes | None = None, section: str = "data", **settings) -> PromptSet:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        columns = {"prompt_key": "q", "answer_key": "a"}
        return load_prompts(DataConfig(files=[str(tmp_path / name)], **columns | settings), tokenizer, section)

    return load


@pytest.fixture
def write_template(tmp_path: Path) -> Callable[..., str]:
    """write_template(source) returns the path of a Jinja file with that source."""

    def write(source: str = "{% for m in messages %}{{ m.content }}{% endfor %}") -> str:
        (tmp_path / "t.jinja").write_text(source)
        return str(tmp_path / "t.jinja")

    return write
