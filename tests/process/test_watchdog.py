"""Jobs of four processes on two nodes, one of which hangs or dies, and the watchdogs that end them. No torch: a pipe stands for the
connection between the ranks. tests/train/test_job.py has a whole run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from dapo_mcore.process.beacon import BeaconReader
from dapo_mcore.process.hang import Limits
from dapo_mcore.process.watchdog import Watch, watch_job
from tests.rollout.sglang.serving import wait_for

ROOT = Path(__file__).parents[2]
LIMITS = Limits(minutes=0.02, dead_s=0.5, disagree_s=0.5, lost_s=0.3, clean_s=5.0)
# a rank in the middle of a step: folder of its node, rank, what it does, the end of a pipe that closes when another rank dies
RANK = """
import os, re, sys, time
from pathlib import Path
from dapo_mcore.process.beacon import Beacon

folder, rank, action, peer = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
beacon = Beacon(folder, rank, str(folder.parent / f"{rank}.json"))
waits = compile("os.read(peer, 1)", "/x/torch/distributed/distributed_c10d.py", "exec")
with beacon.phase("train"):
    if action == "loops":
        re.match("(a+)+$", "a" * 60 + "b")  # in C, and holds the GIL
    elif action == "returns":
        with beacon.waits("broadcast"):
            time.sleep(600)
    elif action == "sleeps":
        time.sleep(600)
    elif action == "is deaf":
        exec(compile("time.sleep(600)", "/x/torch/distributed/distributed_c10d.py", "exec"))
    exec(waits)
os._exit(1)
"""


class Case(NamedTuple):
    """The rank at fault, what it does, what the others do, what is said of it, and how the others end."""

    guilty: int
    action: str
    others: str
    said: str
    status: int


CASES = {
    "stopped": Case(0, "sleeps", "wait", r"is stopped, by SIGSTOP or a debugger, for \d+ s, in phase train", 1),
    "loops": Case(1, "loops", "wait", "is in phase train, without progress for", 1),
    "returns": Case(2, "returns", "wait", r"is in phase train, waiting in collective 1 \(broadcast\)", 1),
    # as NCCL, which does not see a lost connection
    "killed": Case(3, "sleeps", "is deaf", "has ended without a message, in phase train", -signal.SIGTERM),
}
SIGNALS = {"stopped": signal.SIGSTOP, "killed": signal.SIGKILL}


class Job(NamedTuple):
    folder: Path
    ranks: list[subprocess.Popen[bytes]]
    dogs: list[subprocess.Popen[str]]


def start(folder: Path, guilty: int, action: str, others: str) -> Job:
    """Start four ranks, two per node, and the watchdogs of both nodes once all ranks are where they hang."""
    held, holder = os.pipe()
    ranks = []
    for rank in range(4):
        (folder / f"node{rank // 2}").mkdir(parents=True, exist_ok=True)
        # only the guilty rank holds the end that the others wait for
        ends = (holder,) if rank == guilty else (held,)
        doing = action if rank == guilty else others
        command = [sys.executable, "-c", RANK, str(folder / f"node{rank // 2}"), str(rank), doing, str(ends[0])]
        ranks.append(subprocess.Popen(command, cwd=ROOT, pass_fds=ends))
    os.close(held)
    os.close(holder)
    return Job(folder, ranks, [])


def watch(job: Job) -> None:
    """Start both watchdogs."""
    for node in range(2):
        left = job.folder / f"weights{node}"
        left.mkdir()
        told = Watch(
            str(job.folder / f"node{node}"),
            str(job.folder / "shared"),
            node,
            2,
            LIMITS,
            (str(left),),
            str(job.folder / "requeue"),
            0.2,
        )
        command = [sys.executable, "-m", "dapo_mcore.process.watchdog", json.dumps(told)]
        job.dogs.append(subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True))


def phases(job: Job) -> list[str]:
    return [note.phase for node in range(2) for note in BeaconReader(job.folder / f"node{node}").read()]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Job]]:
    """Four jobs at once, each with another guilty rank, which does what the key says."""
    folder = tmp_path_factory.mktemp("jobs")
    started = {name: start(folder / name, *case[:3]) for name, case in CASES.items()}
    try:
        for name, job in started.items():
            wait_for(lambda job=job: phases(job) == ["train"] * 4, 60)
            if name in SIGNALS:
                job.ranks[CASES[name].guilty].send_signal(SIGNALS[name])
            watch(job)
        yield started
    finally:
        for job in started.values():
            for process in (*job.ranks, *job.dogs):
                process.kill()
                process.wait()


@pytest.mark.parametrize("name", CASES)
def test_the_rank_at_fault_is_named_and_the_job_ends(jobs: dict[str, Job], name: str) -> None:
    job, case = jobs[name], CASES[name]
    (_, said), (_, quiet) = (dog.communicate(timeout=120) for dog in job.dogs)
    others = [rank for rank in range(4) if rank != case.guilty]
    line = said.splitlines()[-1]
    who = rf"hang: rank {case.guilty} on \S+ \(process {job.ranks[case.guilty].pid}\) "
    assert re.fullmatch(f"{who}{case.said}.*; ranks {', '.join(map(str, others))} wait for it\\. .+", line), said
    assert f"stack of rank {', '.join(map(str, others))}, innermost call first:\n" in said, said
    assert quiet == ""
    statuses = [rank.wait(60) for rank in job.ranks]
    assert statuses == [-signal.SIGKILL if rank == case.guilty else case.status for rank in range(4)]
    assert sorted(path.name for path in job.folder.iterdir()) == [f"{case.guilty}.json", "requeue", "shared"]
    assert json.loads((job.folder / "requeue").read_text()) == {"hang": line}
    assert json.loads((job.folder / f"{case.guilty}.json").read_text())["message"]["message"] == line


def launched(folder: Path, **more: str) -> dict[str, str]:
    numbers = {"RANK": "1", "LOCAL_RANK": "1", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}
    return {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_ERROR_FILE": str(folder / "error.json"), **numbers, **more}


def test_only_torchrun_jobs_are_watched_and_only_if_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    watch_job({}, "one", tmp_path, 30.0)
    watch_job(launched(tmp_path), "two", tmp_path, None)
    assert list(tmp_path.iterdir()) == []
    watch_job(launched(tmp_path), "three", tmp_path, 30.0).leave()
    (folder,) = tmp_path.iterdir()
    assert folder.name == "dapo_mcore-three-0" and folder.stat().st_mode & 0o777 == 0o700
    assert [note.phase for note in BeaconReader(folder).read()] == ["left"]


# ranks on gloo. In each attempt another rank hangs in another way and place, and the next attempt goes on
GLOO = """
import json, os, re, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as dist
from dapo_mcore.process import watchdog
from dapo_mcore.process.attempt import call_roll
from dapo_mcore.process.hang import Limits

CASES, minutes = json.loads(sys.argv[2]), float(sys.argv[3])
watchdog.Limits = lambda minutes: Limits(minutes, dead_s=1.0, disagree_s=10.0, lost_s=5.0)
rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])

def strikes(place):
    how = {(case[0], case[1]): case[2] for case in CASES[attempt : attempt + 1]}.get((place, rank))
    if how == "loops":
        re.match("(a+)+$", "a" * 60 + "b")
    elif how == "sleeps":
        time.sleep(600)
    elif how in ("is stopped", "dies"):
        os.kill(os.getpid(), signal.SIGSTOP if how == "is stopped" else signal.SIGKILL)
    return how is not None

store, _, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=120)))
name = call_roll(store, rank, size, 120.0)
beacon = watchdog.watch_job(os.environ, name, Path(sys.argv[1]), minutes)
dist.init_process_group("gloo", store=dist.PrefixStore(name, store), rank=rank, world_size=size)
control = dist.new_group(backend="gloo")
with beacon.phase("train"):
    for _ in range(3):
        beacon.tick()
        if strikes("forward"):
            break
        dist.all_reduce(torch.ones(8))
    strikes("update")
with beacon.waits("barrier"):
    dist.barrier(group=control)
with beacon.phase("save"):
    strikes("save")
    with beacon.waits("sum"):
        dist.all_reduce(torch.ones(8), group=control)
dist.destroy_process_group()  # else gloo's threads may abort the process at exit
beacon.leave()
print("done", rank, flush=True)
"""


def run_on_gloo(folder: Path, ranks: int, minutes: float, *hangs: tuple[str, int, str]) -> str:
    """Run GLOO under torchrun, which starts it again after each hang, and return the output; all ranks must end well at last."""
    (folder / "job.py").write_text(GLOO)
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr",
        "127.0.0.1",
        "--nproc-per-node",
        str(ranks),
    ]
    program = [str(folder / "job.py"), str(folder), json.dumps(hangs), str(minutes)]
    done = subprocess.run(
        [sys.executable, *launcher, "--max-restarts", str(len(hangs)), *program],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0 and done.stdout.count("done") == ranks, done.stdout
    return done.stdout


def told(output: str) -> list[tuple[str, str]]:
    """Return each rank that a watchdog has named, and the first words of what it is."""
    what = "is stopped|is in phase train|is between two phases|has ended"
    return re.findall(rf"^hang: rank (\d) on \S+ \(process \d+\) ({what})", output, re.MULTILINE)


def test_torchrun_starts_a_job_again_after_the_watchdog_has_ended_it(tmp_path: Path) -> None:
    output = run_on_gloo(tmp_path, 2, 10.0, ("save", 1, "is stopped"))
    assert told(output) == [("1", "is stopped")], output
    assert json.loads((tmp_path / "requeue").read_text())["hang"].startswith("hang: rank 1 on ")


@pytest.mark.slow
def test_hangs_on_gloo_at_several_places_are_explained_and_the_job_goes_on_each_time(tmp_path: Path) -> None:
    hangs = [("forward", 1, "loops"), ("update", 2, "sleeps"), ("save", 0, "is stopped"), ("forward", 3, "returns")]
    output = run_on_gloo(tmp_path, 4, 0.2, *hangs, ("save", 2, "dies"))
    named = ["is in phase train", "is in phase train", "is stopped", "is between two phases"]
    # torchrun sees the last one, which has died, by itself
    assert told(output) == [(str(hang[1]), is_so) for hang, is_so in zip(hangs, named)], output
