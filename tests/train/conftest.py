"""The task that whole runs train on, and the interpreter of their fake servers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.runs import ROOT
from tests.train.served import fake_beside_reward


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's data and model, in a folder of its own."""
    folder = tmp_path_factory.mktemp("task")
    command = [sys.executable, str(ROOT / "examples/arithmetic.py"), "--out", "runs/arithmetic"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_beside_reward(tmp_path_factory.mktemp("fake"))
