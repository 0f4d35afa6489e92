"""A configuration file that holds only what has no default."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: model}\ndata: {files: [train.jsonl]}\n", encoding="utf-8")
    return path
