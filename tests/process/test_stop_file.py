"""The files that ask a run to stop, and say that it may be started again."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from dapo_mcore.process.stop_file import StopFile


def test_the_file_of_now_is_seen_and_those_of_an_earlier_run_are_not(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    (tmp_path / "requeue").touch()
    file, found = StopFile(tmp_path), threading.Event()
    assert not list(tmp_path.iterdir())
    file.watch(found.set)
    assert not found.wait(1.5)
    (tmp_path / "stop").touch()
    assert found.wait(10)
    file.confirm(12)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"requeue": '{"step": 12}\n'}
    assert json.loads((tmp_path / "requeue").read_text()) == {"step": 12}


def test_a_closed_one_sees_nothing(tmp_path: Path) -> None:
    file, found = StopFile(tmp_path), threading.Event()
    file.watch(found.set)
    file.close()
    file.path.touch()
    assert not found.wait(1.5)
