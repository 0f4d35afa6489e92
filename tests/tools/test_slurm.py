"""The Slurm job: what it would do, real ones that are told to stop, go on by themselves, and fail with a name, and idle ones
(idle_run.py) for what Slurm and the scripts do with any ranks."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
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

DEAD_PROXY = "http_proxy=http://127.0.0.1:9,HTTP_PROXY=http://127.0.0.1:9,all_proxy=http://127.0.0.1:9"
# on a network file system a folder may look different, or not at all, from another node
RANK_1_SEES_NO_CHECKPOINTS = """
import os, pathlib
iterdir = pathlib.Path.iterdir

def told_by_rank_0(folder):
    if folder.name == "checkpoints" and os.environ.get("RANK", "0") != "0":
        raise OSError(116, "Stale file handle", str(folder))
    return iterdir(folder)

pathlib.Path.iterdir = told_by_rank_0
"""
IDLE = f"""
PATH={sys.prefix}/bin:$PATH
torchrun() {{ [[ $* != *" doctor "* ]] && command torchrun "${{@/#dapo_mcore.train/tests.tools.idle_run}}"; }}
python() {{ [[ $* == *--processes* ]] || command python "$@"; }}  # the check of a model that is not used
"""


def dry_run(*arguments: str, cwd: Path = ROOT, **variables: str) -> list[str]:
    environment = {**os.environ, "VENV": sys.prefix, "PYTHONPATH": str(ROOT), **variables}
    command = [JOB, "--dry-run", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_the_dry_run_of_16_nodes_shows_every_command_and_the_configuration() -> None:
    lines = dry_run("optimizer.lr=2e-6")
    train = next(line for line in lines if line.startswith("torchrun"))
    assert "--nnodes 16 --nproc-per-node 8 --node-rank NODE --master-addr FIRST_NODE --master-port PORT" in train
    assert "--shutdown-timeout 600" in train and train.endswith("dapo_32b.yaml optimizer.lr=2e-6 ")
    assert sum(line.startswith("srun") and "optimizer.lr=2e-6" in line for line in lines) == 3
    assert any("--nodes=16 --ntasks=16 --ntasks-per-node=1" in line and "--gres=gpu:8" in line for line in lines)
    assert "  lr: 2.0e-06" in lines and "name: dapo_32b" in lines
    lines = dry_run("--nodes=2", "parallel.data_parallel=1", "rollout.sglang.num_servers=4", DOCTOR="0")
    assert any("--nnodes 2 " in line for line in lines)
    assert sum(line.startswith("srun") for line in lines) == 2


def test_servers_may_have_gpus_beside_those_of_the_ranks() -> None:
    page = (ROOT / "tools/README.md").read_text()
    variables, command = re.search(r"^    (RANKS_PER_NODE=4 GPUS_PER_NODE=8) sbatch (.*)$", page, re.MULTILINE).groups()
    words = [ROOT / command.split()[0], "--dry-run", *command.split()[1:]]
    environment = os.environ | {"VENV": sys.prefix} | dict(pair.split("=") for pair in variables.split())
    lines = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    ranks = [line for line in lines if line.startswith("srun") and " --gres=gpu:8 " in line]
    assert len(ranks) == 2 and any(" --nproc-per-node 4 " in line for line in lines)


def test_a_container_is_mounted_where_the_checkout_and_the_job_are(tmp_path: Path) -> None:
    image = tmp_path / "image.sqsh"
    image.touch()
    for cwd, mounts in ((ROOT, f"{ROOT}:{ROOT}"), (tmp_path, f"{ROOT}:{ROOT},{tmp_path}:{tmp_path}")):
        lines = dry_run(cwd=cwd, VENV="/nowhere", PATH="/usr/bin:/bin", CONTAINER=str(image), MOUNTS="/data:/data")
        srun = [line.replace("\\,", ",") for line in lines if line.startswith("srun")]
        place = f"--container-image={image} --container-mounts={mounts},/data:/data --container-workdir={cwd} "
        assert len(srun) == 3 and all(place in line for line in srun)


def test_help_prints_the_words_and_the_variables() -> None:
    shown = subprocess.run([JOB, "--help"], capture_output=True, text=True, check=True).stdout
    named = re.findall(r"^  ([A-Z_]+)  ", shown, re.MULTILINE)
    assert "[--dry-run] [--nodes=N] [CONFIG.yaml] [a.b=c …]" in shown
    page = (ROOT / "tools/README.md").read_text()
    assert len(named) == 9 and set(re.findall(r"^\| `([A-Z_]+)` \|", page, re.MULTILINE)) == set(named)
    attach = [ROOT / "tools/slurm/attach.sh", "--help"]
    assert "usage: attach.sh JOB [NODE]" in subprocess.run(attach, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        ("--dry-run --node=2", "", "--node=2 is none of --dry-run, --nodes=N, CONFIG.yaml and a.b=c"),
        ("", "", "this is no Slurm job: start it with sbatch, or add --dry-run"),
        (
            "--dry-run a.yaml b.yml",
            "",
            "a job has one configuration, but a.yaml and b.yml are two; name one of them",
        ),
        ("--dry-run --nodes=0", "", "NODES is 0; it must be a whole number of at least 1"),
        ("--dry-run --nodes=abc", "", "NODES is abc; it must be a whole number of at least 1"),
        ("--dry-run", "RANKS_PER_NODE=1.5", "RANKS_PER_NODE is 1.5; it must be a whole number of at least 1"),
        ("--dry-run", "GPUS_PER_NODE=all", "GPUS_PER_NODE is all; it must be a whole number of at least 1"),
        ("--dry-run", "SAVE_SECONDS=10m", "SAVE_SECONDS is 10m; it must be a whole number of at least 1"),
        ("--dry-run", "JOIN_SECONDS=-1", "JOIN_SECONDS is -1; it must be a whole number of at least 1"),
        (
            "--dry-run",
            "GPUS_PER_NODE=4",
            "GPUS_PER_NODE 4 is less than RANKS_PER_NODE 8, but each rank needs a GPU; raise it, or lower RANKS_PER_NODE",
        ),
        ("--dry-run", "MAX_RESTARTS=-1", "MAX_RESTARTS is -1; it must be a whole number of at least 0"),
        ("--dry-run", "DOCTOR=no", "DOCTOR is no; it must be 1 (examine the nodes) or 0"),
        (
            "--dry-run",
            "MOUNTS=/data:/data",
            "MOUNTS is /data:/data, but only a container has mounts; set CONTAINER, or unset MOUNTS",
        ),
        ("--dry-run", "CONTAINER=./no.sqsh", "CONTAINER is ./no.sqsh, which does not exist; correct the path"),
    ],
)
def test_what_means_nothing_is_refused_in_one_line(words: str, variables: str, message: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_JOB")}
    environment |= dict(pair.split("=") for pair in variables.split())
    done = subprocess.run([JOB, *words.split()], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{message}\n")


def test_a_layout_that_is_not_that_of_the_nodes_is_refused_by_the_dry_run() -> None:
    command = [JOB, "--dry-run", "--nodes=3"]
    done = subprocess.run(command, env={**os.environ, "VENV": sys.prefix}, capture_output=True, text=True)
    assert done.returncode == 2 and "world size 24 is not tensor_parallel 8 × pipeline_parallel 2" in done.stderr


def test_a_node_that_cannot_resolve_the_first_one_says_so_before_its_ranks_start(tmp_path: Path) -> None:
    job = {"NODES": "2", "RANKS_PER_NODE": "1", "ATTEMPT": "7.0", "SLURM_NODEID": "1", "SLURMD_NODENAME": "n1"}
    place = {
        "FIRST_NODE": "n0.invalid",
        "PORT": "29500",
        "JOIN_SECONDS": "600",
        "SAVE_SECONDS": "600",
        "MAX_RESTARTS": "0",
    }
    command = ["bash", str(ROOT / "tools/slurm/node.sh"), "train", QUICKSTART]
    environment = {**os.environ, "VENV": sys.prefix, "PYTHONPATH": str(ROOT), **job, **place}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and " cannot reach n0.invalid, another node of the job: " in done.stderr, done.stderr


def test_a_name_with_blanks_and_signs_stays_one_word() -> None:
    lines = dry_run("/data/lr=1/my runs.yaml", VENV="/nowhere", PATH="/usr/bin:/bin")
    assert sum(r"/data/lr=1/my\ runs.yaml" in line for line in lines) == 4
    assert lines[-1] == "# not shown: there is no python with dapo_mcore and torch here"


# srun of a job: the check and the report print, and the ranks are a script
SRUN = """#!/bin/bash
case $* in
  *" check "*) echo run_dir=run ;;
  *" train "*) eval "$RANKS"; exit 1 ;;
esac
"""
SCONTROL = """#!/bin/bash
case $* in
  "show hostnames"*) echo n0 ;;
  "show node"*) echo NodeAddr=127.0.0.1 ;;
  requeue*) echo "$@" >>asked ;;
esac
"""
HANGS, SAVES = "echo hang >run/requeue", "mkdir -p run/checkpoints/step_000010 run/checkpoints/step_000012.1a.partial"


@pytest.mark.parametrize(
    ("ranks", "asked", "last"),
    [
        (f"{SAVES}; {HANGS}", "requeue 7\n", "it hung, and starts again from run/checkpoints/step_000010"),
        (HANGS, "", "it hung without a new checkpoint since its start, so it is not started again"),
        (f"{SAVES}; {HANGS}; touch run/stop", "", "it hung while run/stop was there; submit the job again to go on"),
        (SAVES, "", "the job has failed with status 1; logs of all ranks: run/logs/7.1"),
    ],
    ids=["saved", "nothing saved", "a person has stopped it", "an error"],
)
def test_a_job_that_hung_starts_again_if_it_has_saved_since_its_start(
    tmp_path: Path, ranks: str, asked: str, last: str
) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    for name in ("checkpoints/step_000009", "checkpoints/step_000011.deleted1"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run/requeue").touch()  # of an earlier job
    job = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n0"}
    given = {"SLURMD_NODENAME": "n0", "RANKS": ranks, "DOCTOR": "0", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([JOB], cwd=tmp_path, env=os.environ | job | given, capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == last, done.stderr
    requeued = tmp_path / "asked"
    assert (requeued.read_text() if requeued.exists() else "") == asked
    assert done.returncode == (0 if asked else 1)


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
        settings = {"RANKS_PER_NODE": "1", "VENV": sys.prefix, "DOCTOR": "0"}
        self.task, self.environment = task, os.environ | environment | settings

    def call(self, *command: str) -> str:
        done = subprocess.run(
            command, cwd=self.task, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        queue = subprocess.run(["squeue", "--array"], env=self.environment, capture_output=True, text=True).stdout
        assert done.returncode == 0, done.stderr + queue
        return done.stdout

    def submit(self, name: str, *overrides: str) -> str:
        patch = self.task / "patch"
        patch.mkdir(exist_ok=True)
        (patch / "sitecustomize.py").write_text(RANK_1_SEES_NO_CHECKPOINTS)
        variables = f"ALL,PYTHONPATH={patch}:{ROOT},OMP_NUM_THREADS=1,WRONG_FROM=1000000000,FAKE_DEAF=1,{DEAD_PROXY}"
        return self._sbatch(f"--export={variables}", name=name, arguments=[*OPTIONS, *overrides])

    def submit_idle(self, name: str, *options: str, **variables: str) -> str:
        """Submit a job with two ranks per node that are those of idle_run.py."""
        venv = self.task / "idle"
        (venv / "bin").mkdir(parents=True, exist_ok=True)
        (venv / "bin/activate").write_text(IDLE)
        given = {"PYTHONPATH": ROOT, "VENV": venv, "RANKS_PER_NODE": 2, "SAVE_S": 3, **variables}
        exported = ",".join(["ALL", *(f"{key}={value}" for key, value in given.items())])
        return self._sbatch(f"--export={exported}", *options, name=name, arguments=[])

    def _sbatch(self, *options: str, name: str, arguments: Sequence[str]) -> str:
        options = ("--parsable", "--nodes=2", f"--job-name={name}", f"--output={name}.log", *options)
        # a soft limit of few files is what many login nodes have, and sbatch passes it on
        limited = ["prlimit", "--nofile=256:", "--", "sbatch"]
        return self.call(*limited, *options, JOB, QUICKSTART, *arguments, f"name={name}").strip()

    def tell(self, job: str, signal_name: str = "USR1") -> None:
        self.call("scancel", "--batch", f"--signal={signal_name}", job)

    def given(self, name: str, attempt: str = "*.0") -> list[dict]:
        """Return what the four ranks of an idle job were given, by rank, once all have started."""
        folder, log = self.task / "runs" / name, self.task / f"{name}.log"
        wait_for(lambda: len([*folder.glob(f"{attempt}/rank-*.json")]) == 4, 90, lambda: log.read_text())
        return [json.loads(file.read_text()) for file in sorted(folder.glob(f"{attempt}/rank-*.json"))]

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
    with slurm_cluster(tmp_path_factory.mktemp("slurm"), nodes=4) as environment:
        yield Jobs(task, environment)


@pytest.mark.slurm
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_two_jobs_at_once_get_what_they_asked_for_save_when_told_and_leave_nothing(jobs: Jobs, tmp_path: Path) -> None:
    """The four nodes are one machine: their ports, processes and temporary files could meet."""
    left, used, weights = map(
        Path, ("/tmp/dapo_mcore-node-leftover", "/tmp/dapo_mcore-node-isinuse0", "/dev/shm/dapo_mcore-left")
    )
    for folder in (left, used, weights):
        folder.mkdir(exist_ok=True)
        os.utime(folder, (0, 0))
    lock = os.open(used, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_SH)
    calm = jobs.submit_idle("calm", TMPDIR=str(tmp_path))
    array = jobs.submit_idle("array", "--array=1-2%1")
    ranks = {name: jobs.given(name) for name in ("calm", "array")}
    assert [folder.exists() for folder in (left, used, weights)] == [False, True, False]
    os.close(lock)
    used.rmdir()
    for name, four in ranks.items():
        environments = [rank["environment"] for rank in four]
        assert [variables["SLURM_NODEID"] for variables in environments] == ["0", "0", "1", "1"]
        assert {variables["CUDA_VISIBLE_DEVICES"] for variables in environments} == {"0,1"}, name
        assert {variables["GLOO_SOCKET_IFNAME"] for variables in environments} == {"lo"}
        assert {rank["cpus"] for rank in four} == {os.cpu_count()}
        assert all(soft == hard > 256 for soft, hard in (rank["files"] for rank in four))
        places = {variables["TMPDIR"] for variables in environments}
        assert len(places) == 2 and all(re.fullmatch("/tmp/dapo_mcore-node-.{8}", place) for place in places)
        assert all(variables["TRITON_CACHE_DIR"].startswith(variables["TMPDIR"]) for variables in environments)
    assert len({four[0]["environment"]["MASTER_PORT"] for four in ranks.values()}) == 2

    jobs.tell(calm)
    (jobs.task / "runs/array/stop").touch()
    wait_for(lambda: [*(jobs.task / "runs/calm").glob("*/saving")], 30)
    jobs.tell(calm)  # a second signal, while it saves
    ranks["calm"] = jobs.given("calm", f"{calm}.1")
    assert len([*(jobs.task / "runs/calm").glob("*.0/saved-*")]) == 4

    jobs.given("array", f"{array}.0")  # the last task has the id of the array
    assert "stopped by runs/array/stop; submit the job again to go on" in (jobs.task / "array.log").read_text()
    jobs.tell(array)
    ranks["array"] = jobs.given("array", f"{array}.1")
    assert jobs.state(f"{array}_1") == "COMPLETED"
    jobs.tell(array)
    saving = jobs.task / f"runs/array/{array}.1"
    wait_for(lambda: (saving / "saving").exists(), 30)
    jobs.call("scancel", array)
    wait_for(lambda: not any(Path(f"/proc/{rank['pid']}").exists() for rank in ranks["array"]), 30)
    assert len([*saving.glob("saved-*")]) == 4
    wait_for(lambda: not any(Path(rank["environment"]["TMPDIR"]).exists() for rank in ranks["array"]), 30)
    assert all(Path(f"/proc/{rank['pid']}").exists() for rank in ranks["calm"])

    jobs.tell(calm)
    log = jobs.wait(calm, "calm", "FAILED")
    assert "no rollout step was finished since the last start, so the job is not started again" in log
    assert log.count("attempt ") == 2


@pytest.mark.slurm
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_a_killed_srun_or_torchrun_ends_its_job_within_a_minute(jobs: Jobs, tmp_path: Path) -> None:
    started = {name: jobs.submit_idle(name, DOCTOR=doctor) for name, doctor in (("of-job", "0"), ("of-node", "1"))}
    ranks = {name: jobs.given(name) for name in started}
    node = ranks["of-node"][2]["environment"]["SLURMD_NODENAME"]
    entered = attached(jobs, tmp_path, started["of-node"], node)
    assert f"tools/slurm/node.sh train {QUICKSTART}" in entered, entered
    begin = time.monotonic()
    launcher = processes_of(started["of-node"], "bin/torchrun", "SLURM_NODEID=1")
    for process in [*launcher, *processes_of(started["of-job"], "srun")]:
        os.kill(process, signal.SIGKILL)
    logs = {name: jobs.wait(job, name, "FAILED") for name, job in started.items()}
    assert time.monotonic() - begin < 60
    assert f"failed first: node {node}: torchrun was ended by SIGKILL" in logs["of-node"], logs["of-node"]
    assert "dapo-mcore doctor itself has failed, and the job goes on" in logs["of-node"], (
        "idle jobs have none that works"
    )
    assert "the job has failed with status 137" in logs["of-job"], logs["of-job"]
    everyone = [rank["pid"] for four in ranks.values() for rank in four]
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in everyone), 30)


@pytest.mark.slurm
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_a_job_that_is_told_to_end_saves_is_requeued_and_repeats_the_uninterrupted_run_bitwise(jobs: Jobs) -> None:
    job = jobs.submit("stopped")
    wait_for(lambda: jobs.has_steps("stopped", 2), 180, lambda: (jobs.task / "stopped.log").read_text())
    jobs.tell(job)
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


def is_free(port: int) -> bool:
    with suppress(OSError), socket.create_server(("", port)):
        return True
    return False


@pytest.mark.slurm
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_doctor_ends_a_job_whose_second_node_cannot_start_its_server(
    jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(jobs.environment, "DOCTOR", "1")
    fake = fake_beside_reward(tmp_path)
    keys = [f"reward.function={tmp_path}/reward.py:compute_score", f"rollout.sglang.python={fake}"]
    # two in a row that the kernel gives to no client of another test
    port = next(port for port in range(20_001 + os.getpid() % 10_000, 32_000) if is_free(port - 1) and is_free(port))
    with socket.create_server(("", port)):
        places = {"placement": "nodes", "host": "node", "num_servers": 2, "base_port": port - 1}
        job = jobs.submit(
            "refused", *SERVED, *keys, *(f"rollout.sglang.{key}={value}" for key, value in places.items())
        )
        log = jobs.wait(job, "refused", "FAILED")
    assert re.search(rf"✗ wrong.*\n  ports +n1: .*{port}", log) and "the job ends before its ranks start" in log, log
    run = jobs.task / "runs/refused"
    assert not (run / "metrics.jsonl").exists()
    report = json.loads((run / f"logs/{job}.0/doctor.json").read_text())
    assert [record["host"] for record in report["ranks"]] == ["n0", "n1"] and not report["can_run"]


def attached(jobs: Jobs, folder: Path, job: str, node: str) -> str:
    """Return the command of the process whose container attach.sh enters; a script stands for enroot."""
    (folder / "enroot").write_text("#!/bin/bash\ntr '\\0' ' ' <\"/proc/$2/cmdline\"\n")
    (folder / "enroot").chmod(0o755)
    words = ["env", f"PATH={folder}:{os.environ['PATH']}", "CONTAINER=1", ROOT / "tools/slurm/attach.sh", job, node]
    return jobs.call("script", "-qec", shlex.join(map(str, words)), "/dev/null")


def working_in(folder: Path) -> list[Path]:
    """Return the processes with this working directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found += [process] * ((process / "cwd").readlink() == folder)
    return found


def processes_of(job: str, program: str, *variables: str) -> list[int]:
    """Return the processes of a job with this word in their command and these variables."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            given = (folder / "environ").read_bytes().split(b"\0")
            words = b" ".join((folder / "cmdline").read_bytes().split(b"\0")[:3])
            wanted = {variable.encode() for variable in (f"SLURM_JOB_ID={job}", *variables)}
            found += [int(folder.name)] * (program.encode() in words and wanted <= {*given})
    return sorted(found)


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
