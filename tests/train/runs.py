"""Start runs as users do, on a task that takes seconds, and read their outputs."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "examples/quickstart.yaml")
TRAIN = ("-m", "dapo_mcore.train")
SMALL = [
    "rollout.group_size=4",
    "rollout.max_response_tokens=12",
    "reward.overlong.cache=4",
    "sampling.style=none",
    "sampling.train_batch_prompts=8",
    "sampling.gen_batch_prompts=8",
    "batch.mini_batch_prompts=4",
    "warm_start.max_updates=4",
    "warm_start.check_every=4",
    "warm_start.batch_size=32",
    "eval.every=2",
    "eval.samples_per_prompt=2",
    "eval.sets.heldout.limit=8",
    "warm_start.choose.limit=8",
    "checkpoint.every=3",  # and at the last step
]


def torchrun(processes: int) -> list[str]:
    """Return Python's arguments for torchrun, on a port that the kernel gives it; none for a single process."""
    alone = ["--standalone", "--local-addr", "127.0.0.1"]
    return ["-m", "torch.distributed.run", *alone, "--nproc-per-node", str(processes)] if processes > 1 else []


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}


def python(
    folder: Path, *arguments: str, stdin: str | None = None, merge: bool = False, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run Python in `folder` with these arguments. `merge` puts stderr into stdout, in the order of writing."""
    return subprocess.run(
        [sys.executable, *arguments],
        input=stdin,
        cwd=folder,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if merge else subprocess.PIPE,
        text=True,
        timeout=900,
    )


def run(task: Path, name: str, *overrides: str, processes: int = 1) -> str:
    """Train the quickstart's task and return the output; the run must succeed."""
    layout = f"parallel.tensor_parallel={processes}"
    done = python(task, *torchrun(processes), *TRAIN, QUICKSTART, *SMALL, layout, f"name={name}", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def run_on_two_nodes(task: Path, name: str, *overrides: str) -> None:
    """Train with a torchrun for each of two ranks, as on two nodes; the run must succeed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port]
    arguments = [*TRAIN, QUICKSTART, *SMALL, "parallel.tensor_parallel=2", f"name={name}", *overrides]
    launchers = [["-m", "torch.distributed.run", *job, "--node-rank", str(node)] for node in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(lambda launcher: python(task, *launcher, *arguments), launchers):
            assert done.returncode == 0, done.stdout + done.stderr


def metrics(task: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (task / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def stable(row: dict) -> dict:
    """Return the metrics of a step that do not depend on the machine's speed."""
    timed = ("time/", "perf/", "memory/")
    return {key: value for key, value in row.items() if not key.startswith(timed) and not key.endswith("_s")}


def rewind(run_dir: Path, step: int) -> None:
    """Delete outputs until the folder looks as if the run was killed after the checkpoint of `step`."""
    for path in (run_dir / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    shutil.rmtree(run_dir / "hf", ignore_errors=True)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    (run_dir / "metrics.jsonl").write_text("".join(kept))
