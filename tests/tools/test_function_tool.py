"""The processes of a user's tool: one that does not start. test_toolset.py has whole calls."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from dapo_mcore.config.tools import ToolConfig
from dapo_mcore.errors import ToolError
from dapo_mcore.tools.function_tool import FunctionTool


def start(path: Path) -> None:
    config = ToolConfig(name="t", function=f"{path}:f", parameters={"type": "object"})
    asyncio.run(FunctionTool(config, config.function, {}).start())


def test_a_process_that_ends_at_its_start_is_told(tmp_path: Path):
    (tmp_path / "dies.py").write_text("import os; os._exit(1)")
    with pytest.raises(ToolError, match=r"a process for the tool 't' did not start \(IncompleteReadError"):
        start(tmp_path / "dies.py")


def test_a_process_that_takes_for_ever_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dapo_mcore.tools.function_tool.START_S", 0.3)
    (tmp_path / "slow.py").write_text("import time; time.sleep(600)")
    with pytest.raises(ToolError, match=r"did not start \(TimeoutError; timeout 0 s\)"):
        start(tmp_path / "slow.py")
