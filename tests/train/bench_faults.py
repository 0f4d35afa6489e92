"""Every fault of examples/reliability.md in a small run of two ranks: how the run ends, how soon, and what it says last.

    pytest -m bench -s tests/train/bench_faults.py                    all, in five minutes on two idle cores
    pytest -m bench -s tests/train/bench_faults.py -k "dead rank"    one

The seconds are those from the fault to the end of torchrun. A fault that is there before the start counts from the start.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from dapo_mcore.process.run_lock import RunLock
from tests.checkpoint.stored_checkpoint import flip
from tests.rollout.sglang.fake_server import fake_python
from tests.train.runs import QUICKSTART, SMALL, environment, torchrun

PROGRAM = """
import os, resource, signal, sys, time
from pathlib import Path
from dapo_mcore.train.__main__ import main
from dapo_mcore.actor.actor import Actor
from dapo_mcore.checkpoint import checkpoint
from dapo_mcore.controller import Controller

def at(owner, name, call, action, rank=1):
    # in the call of this number, and in all that follow
    method, calls = getattr(owner, name), []
    def wrapper(*arguments, **more):
        calls.append(name)
        if os.environ["RANK"] == str(rank) and len(calls) >= call:
            mark()
            action()
        return method(*arguments, **more)
    setattr(owner, name, wrapper)

def mark():
    # the first fault counts
    if not os.path.exists(os.environ["FAULT_AT"]):
        Path(os.environ["FAULT_AT"]).touch()

def me(signum):
    os.kill(os.getpid(), signum)

def fill_the_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))

def poison():
    from dapo_mcore.actor import wrap
    finalize = wrap.finalize_without_division
    def poisoned(model, *arguments, **more):
        finalize(model, *arguments, **more)
        if os.environ["RANK"] == "1":
            mark()
            next(model[0].module.parameters()).main_grad.view(-1)[0] = float("nan")
    wrap.finalize_without_division = poisoned

exec(os.environ["INJECTED"])
sys.exit(main())
"""
REWARD = """
import os, time
from pathlib import Path

def fails(data_source, solution_str, ground_truth, extra_info=None):
    number = len(solution_str) % 8
    if number == 0:
        raise ValueError("no answer")
    if number == 1 and not Path("hung").exists():
        Path("hung").touch()
        time.sleep(3600)
    if number == 2:
        os._exit(3)
    return float("nan") if number == 3 else float(number % 2)
"""
SERVED = ["rollout.engine=sglang", "rollout.sglang.device=cpu", "rollout.sglang.sync=tensor"]
UNIFORM = "sampling={style: filter, max_gen_batches: 2, train_batch_prompts: 8, gen_batch_prompts: 8}"
REWARDED = ["reward.function=reward.py:fails", "reward.workers=1", "reward.timeout_seconds=5"]
STALE = {"weight_version": "0", "weight_versions": [{"version": "0", "start": 0, "end": 1}]}


class Fault(NamedTuple):
    """A fault: settings of the run, what its ranks run before it, what a server meets, what is done to the files before it."""

    settings: Sequence[str] = ()
    injected: str = ""
    served: Sequence[dict] = ()
    prepare: Callable[[Path], RunLock | None] = lambda task: None


def bad_row(task: Path) -> None:
    (task / "bad.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": null, "answer": "2"}\n')


def cut_shard(task: Path) -> None:
    shutil.copytree(task / "runs/before/hf/final", task / "cut")
    os.truncate(task / "cut/model.safetensors", 100_000)


def resumed(task: Path) -> None:
    shutil.copytree(task / "runs/before", task / "runs/run")
    shutil.rmtree(task / "runs/run/hf")


def damaged(task: Path) -> None:
    resumed(task)
    flip("shards/rank_00001.safetensors", -1)(task / "runs/run/checkpoints/step_000002")


FAULTS = {
    "kill while saving": Fault(injected="at(checkpoint, 'write_shard', 2, lambda: me(signal.SIGKILL))"),
    "damaged checkpoint": Fault(prepare=damaged),
    "full disk": Fault(injected="at(checkpoint, 'write_shard', 2, fill_the_disk)"),
    "NaN gradient": Fault(injected="poison()"),
    "hung rank": Fault(injected="at(Actor, 'update', 3, lambda: me(signal.SIGSTOP))"),
    "dead rank": Fault(injected="at(Actor, 'update', 3, lambda: me(signal.SIGKILL))"),
    "SIGTERM": Fault(injected="at(Controller, 'rollout', 2, lambda: os.kill(os.getppid(), signal.SIGTERM), rank=0)"),
    "stop file": Fault(injected="at(Controller, 'rollout', 2, lambda: Path('runs/run/stop').touch(), rank=0)"),
    "server dies while it generates": Fault(SERVED, served=[{"kind": "die", "after": 50}]),
    "server dies in a weight sync": Fault(SERVED, served=[{"kind": "die", "where": "bucket 1", "after": 1}]),
    "answer from other weights": Fault(SERVED, served=[{"kind": "edit", "value": STALE, "after": 40, "count": 3}]),
    "reward fails": Fault(REWARDED),
    "no group varies": Fault([UNIFORM]),
    "malformed row": Fault(["data.files=[bad.jsonl]"], prepare=bad_row),
    "tokenizer of another model": Fault(["model.overrides={vocab_size: 10}"]),
    "truncated model file": Fault(["model.path=cut", "model.init=pretrained"], prepare=cut_shard),
    "other layout at resume": Fault(
        ["parallel.tensor_parallel=1", "parallel.pipeline_parallel=2", "num_rollout_steps=3"], prepare=resumed
    ),
    "two runs in one folder": Fault(prepare=lambda task: RunLock(task / "runs/run")),
}
SETTINGS = [
    "parallel.tensor_parallel=2",
    "warm_start=null",
    "eval.sets={}",
    "num_rollout_steps=3",
    "checkpoint.every=1",
]
SETTINGS += ["observe.tensorboard=false", "observe.plot_at_end=false", "checkpoint.keep=9"]


def start(task: Path, fault: Fault, *overrides: str) -> subprocess.Popen[str]:
    program, faults = task / "program.py", task / "faults.json"
    program.write_text(PROGRAM)
    (task / "reward.py").write_text(REWARD)
    if fault.served:
        faults.write_text(json.dumps(fault.served))
    python = f"rollout.sglang.python={fake_python(task)}"
    variables = {
        "INJECTED": fault.injected,
        "FAULT_AT": str(task / "fault"),
        "FAKE_FAULTS": str(faults),
        "FAKE_DEAF": "1",
    }
    arguments = [*torchrun(2), str(program), QUICKSTART, *SMALL, *SETTINGS, python, *fault.settings, *overrides]
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=task,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module", autouse=True)
def before(task: Path) -> None:
    """Make a run of two steps, whose checkpoints and export some faults damage."""
    process = start(task, Fault(), "name=before", "num_rollout_steps=2")
    output = process.communicate()[0]
    assert process.returncode == 0, output


@pytest.mark.bench
@pytest.mark.parametrize("name", FAULTS)
def test_what_a_fault_does(task: Path, name: str) -> None:
    fault, mark = FAULTS[name], task / "fault"
    shutil.rmtree(task / "runs/run", ignore_errors=True)
    mark.unlink(missing_ok=True)
    held = fault.prepare(task)  # a lock lives as long as its object
    begin = time.time()
    process = start(task, fault, "name=run")
    output = process.communicate(timeout=600)[0]
    end = time.time()
    if isinstance(held, RunLock):
        held.release()
    since = mark.stat().st_mtime if mark.exists() else begin
    told = [
        line
        for line in output.splitlines()
        if re.match(r"error|warning|hang|rollout server|reward failed|stopped|resumed", line)
    ]
    last = output.rstrip("=\n ").splitlines()[-1] if process.returncode else ""
    print(f"\n== {name}: status {process.returncode}, {end - since:.0f} s ({end - begin:.0f} s in all)")
    print("\n".join(["   " + line for line in (*dict.fromkeys(told), last)]))
