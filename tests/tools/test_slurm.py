"""The Slurm job: what it would do, and a real one that is told to stop, goes on by itself, and fails with a name."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.rollout.sglang.serving import wait_for
from tests.tools.slurm_cluster import missing, slurm_cluster
from tests.train.runs import QUICKSTART, ROOT, SMALL, TRAIN, metrics, python, stable, torchrun
from tests.train.served import SERVED, fake_beside_reward

JOB = str(ROOT / "tools/dapo_32b.slurm")
SCRIPTS = [*ROOT.glob("tools/*.slurm"), *ROOT.glob("tools/**/*.sh")]
OPTIONS = [*SMALL, "num_rollout_steps=8", "warm_start.max_updates=1", "warm_start.stop_at=null", "checkpoint.every=1"]


def dry_run(*arguments: str, **variables: str) -> list[str]:
    command = [JOB, "--dry-run", *arguments]
    environment = {**os.environ, "VENV": sys.prefix, **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_dry_run_of_16_nodes_shows_every_command_and_the_configuration() -> None:
    lines = dry_run("optimizer.lr=2e-6")
    train = next(line for line in lines if line.startswith("torchrun"))
    assert "--nnodes 16 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:PORT" in train
    assert "--shutdown-timeout 600" in train and train.endswith("dapo_32b.yaml optimizer.lr=2e-6 ")
    assert sum(line.startswith("srun") and "optimizer.lr=2e-6" in line for line in lines) == 2
    assert any("--nodes=16 --ntasks=16 --ntasks-per-node=1" in line and "--gres=gpu:8" in line for line in lines)
    assert "  lr: 2.0e-06" in lines and "name: dapo_32b" in lines
    assert any("--nnodes 2 " in line for line in dry_run("--nodes=2"))


def test_a_container_is_mounted_where_the_checkout_and_the_job_are() -> None:
    lines = dry_run(CONTAINER="image.sqsh", MOUNTS="/data:/data")
    srun = [line.replace("\\,", ",") for line in lines if line.startswith("srun")]
    place = f"--container-image=image.sqsh --container-mounts={ROOT}:{ROOT},{Path.cwd()}:{Path.cwd()},/data:/data"
    assert len(srun) == 2 and all(f"{place} --container-workdir={Path.cwd()}" in line for line in srun)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dry-run", "--node=2"], "--node=2 is none of --dry-run, --nodes=N, CONFIG.yaml and a.b=c"),
        (["--dry-run", "--nodes=0"], "0 nodes × 8 ranks: both must be at least 1"),
        ([], "this is no Slurm job: start it with sbatch, or add --dry-run"),
    ],
)
def test_what_means_nothing_is_refused_in_one_line(words: list[str], message: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_JOB")}
    done = subprocess.run([JOB, *words], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{message}\n")


def test_a_name_with_blanks_and_signs_stays_one_word() -> None:
    lines = dry_run("/data/lr=1/my runs.yaml", VENV="/nowhere", PATH="/usr/bin:/bin")
    assert sum(r"/data/lr=1/my\ runs.yaml" in line for line in lines) == 3
    assert lines[-1] == "# not shown: there is no python with dapo_mcore here"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_the_scripts_are_clean() -> None:
    assert len(SCRIPTS) > 3
    done = subprocess.run(["shellcheck", *map(str, SCRIPTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    python(folder, str(ROOT / "examples/arithmetic.py"), "--out", "runs/arithmetic")
    return folder


class Jobs:
    """Jobs of two nodes with one rank each, in the folder `task`."""

    def __init__(self, task: Path, environment: dict[str, str]):
        self.task, self.environment = task, os.environ | environment | {"RANKS_PER_NODE": "1", "VENV": sys.prefix}

    def call(self, *command: str) -> str:
        done = subprocess.run(command, cwd=self.task, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, name: str, *overrides: str) -> str:
        options = ["--parsable", "--nodes=2", f"--job-name={name}", f"--output={name}.log"]
        variables = f"ALL,PYTHONPATH={ROOT},OMP_NUM_THREADS=1,WRONG_FROM=1000000000,FAKE_DEAF=1"
        return self.call(
            "sbatch", *options, f"--export={variables}", JOB, QUICKSTART, f"name={name}", *OPTIONS, *overrides
        ).strip()

    def state(self, job: str) -> str:
        return re.search(r"JobState=(\w+)", self.call("scontrol", "show", "job", job))[1]

    def wait(self, job: str, name: str, state: str) -> str:
        """Return the job's log once it is in this state."""
        log = self.task / f"{name}.log"
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_for(lambda: self.state(job) in ends, 300, lambda: log.read_text())
        assert self.state(job) == state, log.read_text()
        return log.read_text()

    def has_steps(self, name: str, count: int) -> bool:
        path = self.task / "runs" / name / "metrics.jsonl"
        return path.exists() and len(path.read_text().splitlines()) > count


@pytest.fixture(scope="module")
def jobs(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm"), nodes=2) as environment:
        yield Jobs(task, environment)


@pytest.mark.slurm
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_a_job_that_is_told_to_end_saves_is_requeued_and_repeats_the_uninterrupted_run_bitwise(jobs: Jobs) -> None:
    job = jobs.submit("stopped")
    wait_for(lambda: jobs.has_steps("stopped", 2), 180, lambda: (jobs.task / "stopped.log").read_text())
    jobs.call("scancel", "--batch", "--signal=USR1", job)
    log = jobs.wait(job, "stopped", "COMPLETED")
    assert f"attempt {job}.0 on n[0-1]" in log and f"attempt {job}.1 on n[0-1]" in log and "Traceback" not in log, log
    assert "runs/stopped/stop: the run saves" in log and "resumed after rollout step" in log, log
    whole = [*torchrun(2), *TRAIN, QUICKSTART, *OPTIONS, "name=whole"]
    assert python(jobs.task, *whole).returncode == 0
    rows = [[stable(row) for row in metrics(jobs.task, name)] for name in ("whole", "stopped")]
    assert rows[0] == rows[1] and len(rows[0]) == 9
    run = jobs.task / "runs/stopped"
    assert json.loads((run / "requeued").read_text())["step"] >= 2
    assert not (run / "stop").exists() and not (run / "requeue").exists()
    assert len(list(run.glob("logs/*/n[01]/*/attempt_0/0/stdout.log"))) == 4


@pytest.mark.slurm
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_a_lost_rank_ends_the_job_with_its_node_and_number_and_leaves_no_server(jobs: Jobs, tmp_path: Path) -> None:
    fake = fake_beside_reward(tmp_path)
    reward, python = f"reward.function={tmp_path}/reward.py:compute_score", f"rollout.sglang.python={fake}"
    places = [f"rollout.sglang.{key}" for key in ("placement=nodes", "host=node", "num_servers=2")]
    job = jobs.submit("lost", *SERVED, reward, python, *places, "num_rollout_steps=1000")
    wait_for(lambda: jobs.has_steps("lost", 2), 180, lambda: (jobs.task / "lost.log").read_text())
    assert metrics(jobs.task, "lost")[-1]["rollout/servers_serving"] == 2
    folder = jobs.task / "runs/lost/servers"
    assert len(working_in(folder)) == 2
    process, node = rank_of(job, 1)
    os.kill(process, signal.SIGKILL)
    log = jobs.wait(job, "lost", "FAILED")
    assert f"failed first: node {node}, rank 1: Signal 9 (SIGKILL) received by PID {process}" in log, log
    wait_for(lambda: not working_in(folder), 30)


@pytest.mark.slurm
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_a_mistake_is_told_once_before_any_rank_starts(jobs: Jobs) -> None:
    job = jobs.submit("mistaken", "optimizer.lr=fast")
    log = jobs.wait(job, "mistaken", "FAILED")
    assert log.count("optimizer.lr") == 1 and "torchrun" not in log, log


def working_in(folder: Path) -> list[Path]:
    """Return the processes with this working directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found += [process] * ((process / "cwd").readlink() == folder)
    return found


def rank_of(job: str, rank: int) -> tuple[int, str]:
    """Return the process id and the node of a job's rank."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        command = (folder / "cmdline").read_bytes()
        is_rank = b"dapo_mcore.train" in command and b"torchrun" not in command
        if is_rank and {f"SLURM_JOB_ID={job}".encode(), f"RANK={rank}".encode()} <= {*variables}:
            node = next(entry for entry in variables if entry.startswith(b"SLURMD_NODENAME="))
            return int(folder.name), node.decode().partition("=")[2]
    raise AssertionError(f"no rank {rank} of job {job}")
