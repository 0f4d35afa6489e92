"""Kill a run again and again, at random: it ends with the bits of the undisturbed one.

pytest -m slow tests/train/test_kills.py -s
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.train.runs import QUICKSTART, SMALL, TRAIN, environment, metrics, stable, torchrun

NUM_KILLS = 50
OPTIONS = [
    *("num_rollout_steps=20", "eval.every=10", "checkpoint.every=1", "checkpoint.async_save=true"),
    *("observe.tensorboard=false", "observe.plot_at_end=false", "parallel.tensor_parallel=1"),
]


def start(task: Path, name: str) -> subprocess.Popen[bytes]:
    arguments = [*torchrun(2), *TRAIN, QUICKSTART, *SMALL, f"name={name}", *OPTIONS]
    with open(task / f"{name}.log", "ab") as log:
        return subprocess.Popen([sys.executable, *arguments], cwd=task, env=environment(), stdout=log, stderr=log)


def kill(process: subprocess.Popen[bytes], with_savers: bool) -> None:
    """Kill torchrun and its ranks; with their savers as if the machine died."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            if with_savers or "dapo_mcore.checkpoint.saver" not in member.cmdline():
                member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=30)


def first_step_ended(task: Path, name: str, process: subprocess.Popen[bytes]) -> bool:
    """Wait for this start's first rollout step. Return False if the run ends before."""
    rows = task / "runs" / name / "metrics.jsonl"
    before = rows.stat().st_mtime_ns if rows.exists() else 0
    while not rows.exists() or rows.stat().st_mtime_ns == before:
        if process.poll() is not None:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_ends_with_the_same_bits(task: Path) -> None:
    """Two data-parallel ranks, which save beside training. Each start is killed at a random time between its first step and a third of
    the undisturbed run; the sixth one goes to its end."""
    luck, killed, ended = random.Random(0), 0, 0
    whole = start(task, "whole")
    assert first_step_ended(task, "whole", whole), (task / "whole.log").read_text()
    begin = time.monotonic()
    assert whole.wait(1800) == 0, (task / "whole.log").read_text()
    took = time.monotonic() - begin
    expected = [stable(row) for row in metrics(task, "whole")]
    final = "hf/final/model.safetensors"
    while killed < NUM_KILLS:
        shutil.rmtree(task / "runs/parts", ignore_errors=True)
        for attempt in range(6):
            process = start(task, "parts")
            doomed = attempt < 5 and killed < NUM_KILLS and first_step_ended(task, "parts", process)
            try:
                assert process.wait(luck.random() * took / 3 if doomed else None) == 0, (task / "parts.log").read_text()
                break
            except subprocess.TimeoutExpired:
                kill(process, with_savers=luck.random() < 0.5)
                killed += 1
        assert [stable(row) for row in metrics(task, "parts")] == expected
        assert (task / "runs/whole" / final).read_bytes() == (task / "runs/parts" / final).read_bytes()
        left = [path.name for path in (task / "runs/parts/checkpoints").iterdir()]
        assert not [name for name in left if name.endswith((".corrupt", ".set_aside"))], left
        ended += 1
        print(f"{killed} kills, {ended} of {ended} ends with the same bits", flush=True)
