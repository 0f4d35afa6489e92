"""Which process may write to a run's folder. Other boot ids and old files stand for other machines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dapo_mcore.errors import ConfigError
from dapo_mcore.process import run_lock
from dapo_mcore.process.run_lock import LOCK, STALE_S, RunLock

HOLD = """
import sys
from pathlib import Path
from dapo_mcore.process.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def holder(run_dir: Path) -> subprocess.Popen[str]:
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run_dir)], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def left_by(run_dir: Path, age_s: float, **record: object) -> None:
    run_dir.mkdir()
    content = {
        "host": "node7",
        "boot": "another",
        "pid": 4,
        "since": "2026-11-01 10:00:00",
        "job": None,
        "restart": "0",
    }
    (run_dir / LOCK).write_text(json.dumps(content | record))
    os.utime(run_dir / LOCK, (time.time() - age_s,) * 2)


def test_a_live_process_keeps_the_folder_and_a_killed_one_leaves_it(tmp_path: Path) -> None:
    process = holder(tmp_path / "run")
    with pytest.raises(
        ConfigError, match=rf"another run is using .*/run: process {process.pid} on .*, since 20.* name"
    ):
        RunLock(tmp_path / "run")
    process.kill()
    process.communicate()
    assert (tmp_path / "run" / LOCK).exists()
    RunLock(tmp_path / "run").release()
    assert (tmp_path / "run").is_dir() and list((tmp_path / "run").iterdir()) == []


def test_another_machine_counts_as_alive_while_it_touches_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_by(tmp_path / "fresh", STALE_S - 20, job="77")
    with pytest.raises(
        ConfigError, match=r"process 4 on node7, job 77, since 2026-11-01.*10\d s ago.*delete .*/fresh/.lock"
    ):
        RunLock(tmp_path / "fresh")
    left_by(tmp_path / "old", STALE_S + 1)
    RunLock(tmp_path / "old").release()
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    RunLock(tmp_path / "fresh").release()  # Slurm has ended the job before it started it again


def test_on_a_file_system_without_locks_the_age_of_the_lock_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> None:
        raise OSError(37, "No locks available")

    own = RunLock(tmp_path / "own")
    boot = json.loads((tmp_path / "own" / LOCK).read_text())["boot"]
    own.release()
    monkeypatch.setattr(run_lock.fcntl, "lockf", refuses)
    left_by(tmp_path / "run", 1, boot=boot)
    with pytest.raises(ConfigError, match="another run is using"):
        RunLock(tmp_path / "run")
    left_by(tmp_path / "old", STALE_S + 1, boot=boot)
    RunLock(tmp_path / "old").release()


def test_a_held_lock_is_touched_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "HEARTBEAT_S", 0.01)
    lock = RunLock(tmp_path)
    os.utime(tmp_path / LOCK, (1, 1))
    end = time.monotonic() + 60
    while (tmp_path / LOCK).stat().st_mtime < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    lock.release()


def test_a_release_removes_the_folders_that_the_lock_made_and_nothing_uses(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "runs/deep/name")
    lock.release()
    lock.release()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "kept").mkdir()
    RunLock(tmp_path / "kept").release()
    assert (tmp_path / "kept").is_dir()
    lock = RunLock(tmp_path / "runs/used")
    (tmp_path / "runs/used/config.yaml").touch()
    lock.release()
    assert [path.name for path in (tmp_path / "runs/used").iterdir()] == ["config.yaml"]
