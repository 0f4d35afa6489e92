"""Runs that a signal or their stop file ends: they save where they stand, and go on bitwise as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.rollout.sglang.serving import wait_for
from tests.train.runs import QUICKSTART, SMALL, TRAIN, environment, metrics, python
from tests.train.same_run import assert_same_run

# runs in one process, as importing takes longer. A case is overrides, and perhaps a signal in the midst of a step's
# generation, reward, gradient steps, sync or export; "file" makes the stop file in place of a signal
RUNS = """
import json, os, signal, sys, time
from pathlib import Path
from dapo_mcore.actor.parallel import layout
from dapo_mcore.actor.actor import Actor
from dapo_mcore.actor.learner import Learner
from dapo_mcore.controller import Controller
from dapo_mcore.reward.scorer import Scorer
from dapo_mcore.rollout.embedded import EmbeddedEngine
from dapo_mcore.train import outputs
from dapo_mcore.train.__main__ import main

plan, counts = {}, {}

def striking(owner, name, begins, at):
    method = getattr(owner, name)
    def wrapper(self, *arguments, **more):
        if begins:
            counts.clear()
            counts["step"] = f"{name} {[*arguments, *more.values()][0]}"
        else:
            counts[name] = counts.get(name, 0) + 1
            if plan.get("in") == name and plan["step"] == counts.get("step") and counts[name] == at:
                strike(plan["signal"])
        return method(self, *arguments, **more)
    setattr(owner, name, wrapper)

def strike(name):
    if name == "file":
        Path("runs/by-file/stop").touch()
        time.sleep(2)
    else:
        os.kill(os.getpid(), getattr(signal, name))

striking(Controller, "rollout", True, 0)
striking(Controller, "evaluate", True, 0)
striking(EmbeddedEngine, "_forward", False, 3)
striking(Actor, "update", False, 2)
striking(Actor, "__init__", False, 1)
striking(Learner, "score", False, 1)
striking(Scorer, "__call__", False, 1)
striking(EmbeddedEngine, "update_weights", False, 1)
striking(outputs, "save_hf_folder", False, 1)
for case, plan in json.loads(os.environ["CASES"]):
    counts.clear()
    status = main([*sys.argv[1:], *case])
    layout.stop()
    requeue = Path("runs/by-file/requeue")
    print(requeue.read_text() if requeue.exists() else "no requeue")
    print("ENDED", status, flush=True)
"""
OPTIONS = ["warm_start.max_updates=1", "warm_start.stop_at=null", "parallel.tensor_parallel=1", "eval.every=100"]
OPTIONS += ["num_rollout_steps=3", "observe.tensorboard=false", "observe.plot_at_end=false", "checkpoint.every=null"]


def runs(task: Path, *cases: tuple[list[str], dict]) -> list[tuple[int, str]]:
    """Status and output of each run."""
    arguments = ["-c", RUNS, QUICKSTART, *SMALL, *OPTIONS]
    done = python(task, *arguments, merge=True, CASES=json.dumps(cases))
    *outputs, _ = done.stdout.split("ENDED ")
    statuses = [int(text.split()[0]) for text in done.stdout.split("ENDED ")[1:]]
    assert len(statuses) == len(cases), done.stdout
    return list(zip(statuses, outputs))


def signalled(name: str, place: str, step: str | None) -> dict:
    return {"signal": name, "in": place, "step": step}


def test_a_run_that_signals_stop_saves_by_itself_and_repeats_the_uninterrupted_one_bitwise(task):
    stopped, kept = ["name=stopped"], ["name=kept", "checkpoint.keep_rollouts=true", "checkpoint.every=1"]
    cases = [
        (["name=whole"], {}),
        (stopped, signalled("SIGTERM", "_forward", "rollout 1")),  # nothing trained: the warm start is saved
        (stopped, signalled("SIGINT", "update", "rollout 1")),  # the step is finished
        (stopped, signalled("SIGHUP", "_forward", "rollout 2")),  # its step is saved already
        (stopped, signalled("SIGTERM", "__call__", "rollout 2")),
        (stopped, signalled("SIGTERM", "update", "rollout 2")),
        (stopped, signalled("SIGTERM", "update_weights", "rollout 3")),
        (stopped, signalled("SIGTERM", "_forward", "evaluate 3")),  # the evaluation is made up for
        (stopped, signalled("SIGTERM", "save_hf_folder", "evaluate 3")),
        (stopped, {}),
        (stopped, {}),
        (kept, signalled("SIGTERM", "score", "rollout 2")),  # generated and scored, but not trained on
        (kept, {}),
    ]
    ended = runs(task, *cases)
    statuses = [0, 143, 130, 129, *(143,) * 5, 0, 0, 143, 0]
    assert [status for status, _ in ended] == statuses, ended
    folder = "runs/stopped/checkpoints/step_00000"
    names = ("SIGTERM", "SIGINT", "SIGHUP", *("SIGTERM",) * 5)
    for (_, output), name, step in zip(ended[1:9], names, (0, 1, 1, 1, 2, 3, 3, 3), strict=True):
        told = f"stopped by {name}: the last checkpoint is {folder}{step}; the same command goes on from there"
        assert told in output.splitlines(), output
        assert "torchrun" not in output and "Traceback" not in output, output  # there is no torchrun here
    notices = [f"{name}: the run saves" in output for (_, output), name in zip(ended[1:9], names, strict=True)]
    assert notices == [*(True,) * 7, False]  # the last one only exports, which a signal ends
    assert "warm start" in ended[1][1] and "warm start" not in ended[2][1] + ended[8][1]
    assert "nothing to do, and nothing changed" in ended[10][1]
    assert [row["step"] for row in metrics(task, "stopped")] == [0, 1, 2, 3]
    assert_same_run(task / "runs/whole", task / "runs/stopped")
    final = "hf/final/model.safetensors"
    again = metrics(task, "kept")
    assert [row["sampling/samples_generated"] for row in again[1:]] == [32, 0, 32], again
    whole = metrics(task, "whole")
    assert [row["actor/loss"] for row in again[1:]] == [row["actor/loss"] for row in whole[1:]]
    assert len({(task / "runs" / name / final).read_bytes() for name in ("whole", "stopped", "kept")}) == 1


def test_the_stop_file_ends_a_run_with_status_0_once_it_is_saved(task):
    stopped = ["name=by-file"]
    cases = [
        (["name=undisturbed"], {}),
        (stopped, signalled("file", "_forward", "rollout 2")),  # its step is saved already
        (stopped, signalled("file", "__init__", None)),  # while the model is built
        (stopped, signalled("file", "update", "rollout 2")),  # the step is finished
        (stopped, {}),
    ]
    ended = runs(task, *cases)
    assert [status for status, _ in ended] == [0] * 5, ended
    for (_, output), step in zip(ended[1:4], (1, 1, 2), strict=True):
        told = f"stopped by the file stop: the last checkpoint is runs/by-file/checkpoints/step_00000{step}"
        assert told in output and "runs/by-file/stop: the run saves" in output and "Traceback" not in output, output
        assert f'{{"step": {step}}}' in output.splitlines(), output
    assert "no requeue" in ended[4][1] and not (task / "runs/by-file/stop").exists()
    assert_same_run(task / "runs/undisturbed", task / "runs/by-file")


# the process group is never made, as if a rank were missing
WAITS = """
import os, signal, sys, time
from dapo_mcore.train.__main__ import main
from dapo_mcore.train import job
job.layouts.start = lambda *_: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(60))
sys.exit(main())
"""


def has_reader(fifo: Path) -> bool:
    try:
        os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)  # stays open, so that the reader waits for what is never written
    except OSError:
        return False
    return True


def test_a_signal_at_the_start_leaves_one_line_and_the_documented_status(task, tmp_path):
    os.mkfifo(tmp_path / "run.yaml")
    reading = subprocess.Popen(
        [sys.executable, *TRAIN, str(tmp_path / "run.yaml")],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: reading.poll() is not None or has_reader(tmp_path / "run.yaml"), 60)
    reading.send_signal(signal.SIGINT)
    assert reading.communicate(timeout=60)[1] == "stopped by SIGINT before the first step; nothing to save\n"
    assert reading.returncode == 130
    waiting = python(task, "-c", WAITS, QUICKSTART, *SMALL, *OPTIONS)
    assert waiting.returncode == 143
    assert waiting.stderr == "stopped by SIGTERM before the first step; nothing to save\n"
