"""The files that ask a run to stop, and say that it may be started again."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from dapo_mcore.process.stop_file import StopFile


def test_the_file_of_now_is_seen_and_those_of_an_earlier_run_are_not(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    (tmp_path / "requeue").touch()
    told: list[str] = []
    file, found = StopFile(tmp_path, time.time() + 60, told.append), threading.Event()
    assert not list(tmp_path.iterdir())
    assert told == [f"{tmp_path}/stop is older than this start, so it was removed; make it again to stop this run"]
    file.watch(found.set)
    assert not found.wait(1.5)
    (tmp_path / "stop").touch()
    assert found.wait(10)
    file.confirm(12)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"requeue": '{"step": 12}\n'}
    assert json.loads((tmp_path / "requeue").read_text()) == {"step": 12}


def test_a_file_that_is_made_while_python_imports_is_not_lost(tmp_path: Path) -> None:
    since = time.time() - 60
    (tmp_path / "stop").touch()
    file, found = StopFile(tmp_path, since, pytest.fail), threading.Event()
    file.watch(found.set)
    assert found.wait(10)


def test_a_closed_one_sees_nothing(tmp_path: Path) -> None:
    file, found = StopFile(tmp_path, 0.0, pytest.fail), threading.Event()
    file.watch(found.set)
    file.close()
    file.path.touch()
    assert not found.wait(1.5)
