"""Whole runs that are ended early, or have nothing to do. Servers are fake."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.reliability_page import assert_told
from tests.rollout.sglang.fake_server import fake_python
from tests.rollout.sglang.serving import wait_for
from tests.train.runs import QUICKSTART, SMALL, TRAIN, environment, torchrun

# rank 1 cannot build its part of the model, while rank 0 is at the same work or waits for it in a collective
RANK_1_FAILS = """
import os, sys, time
from dapo_mcore.errors import CheckpointError
from dapo_mcore.train import loop
from dapo_mcore.train.__main__ import main

build = loop.Actor

def fails(*arguments):
    if os.environ["RANK"] == "1":
        raise CheckpointError("model-00002-of-00002.safetensors is truncated; fetch it again")
    if "SLOW" in os.environ:
        time.sleep(60)
    return build(*arguments)

loop.Actor = fails
sys.exit(main())
"""
# runs with different overrides in one process, since importing takes longer than a run. The folder is copied after each
SEVERAL = """
import os, shutil, sys
from dapo_mcore.train.__main__ import main
for number, case in enumerate(os.environ["CASES"].split(",")):
    assert main([*sys.argv[1:], *case.split()]) == 0
    shutil.copytree("runs/done", f"done.{number}")
    print("ENDED", flush=True)
"""
SERVED = [
    "rollout.engine=sglang",
    "rollout.sglang.device=cpu",
    "warm_start=null",
    "eval.sets={}",
    "checkpoint.every=1",
    "checkpoint.export_at_end=false",
    "observe.tensorboard=false",
    "observe.plot_at_end=false",
]


@pytest.fixture
def shared(tmp_path) -> Path:
    """Return a folder that the run uses in place of /dev/shm."""
    (tmp_path / "shared").mkdir()
    return tmp_path / "shared"


def start(
    folder: Path,
    task: Path,
    *overrides: str,
    program: tuple[str, ...] = (),
    processes: int = 1,
    **more: str,
) -> subprocess.Popen[str]:
    """Start a run with a fake server whose interpreter lies in `folder`."""
    python = fake_python(folder, tokens_per_s=2000)
    arguments = [*SMALL, *SERVED, f"rollout.sglang.python={python}", f"parallel.tensor_parallel={processes}"]
    return subprocess.Popen(
        [
            sys.executable,
            *torchrun(processes),
            *(program or TRAIN),
            QUICKSTART,
            *arguments,
            f"rollout.sglang.sync_dir={folder / 'shared'}",
            *overrides,
        ],
        cwd=task,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=600)[0]
    finally:
        process.kill()


def servers(run_dir: Path) -> list[str]:
    """Return the command lines of this run's servers."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if f"{run_dir}/servers/" in command:
            found.append(command)
    return found


@pytest.mark.parametrize("more", [{"FAKE_DEAF": "1"}, {"SLOW": "1"}], ids=["rank 0 waits for it", "rank 0 builds"])
def test_a_rank_that_fails_to_build_its_model_leaves_no_servers_and_its_message_comes_last(
    task, tmp_path, shared, more
):
    (tmp_path / "program.py").write_text(RANK_1_FAILS)
    begun = start(tmp_path, task, "name=broken", program=(str(tmp_path / "program.py"),), processes=2, **more)
    output = ended(begun)
    assert begun.returncode == 1 and (task / "runs/broken/servers/server-0.log").exists(), output
    assert servers(task / "runs/broken") == [] and list(shared.iterdir()) == []
    assert output.rstrip("=\n").endswith("model-00002-of-00002.safetensors is truncated; fetch it again"), output
    assert re.search(r"Root Cause.*rank +: 1 ", output, re.DOTALL) and "[rank" not in output, output


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("whom", ["torchrun", "all"])
def test_a_signal_under_torchrun_saves_a_checkpoint_and_prints_one_line(task, tmp_path, shared, whom):
    """Ctrl-C in a terminal sends the signal to torchrun, Slurm sends it to every process."""
    name, signum = f"stopped-{whom}", signal.SIGINT if whom == "torchrun" else signal.SIGTERM
    begun = start(tmp_path, task, f"name={name}", "num_rollout_steps=1000", "checkpoint.every=null", processes=2)
    wait_for(lambda: (task / "runs" / name / "samples").exists() or begun.poll() is not None, 300)
    assert len(servers(task / "runs" / name)) == 1 and list(shared.iterdir()) != []
    for pid in [*(children(begun.pid) if whom == "all" else ()), begun.pid]:
        os.kill(pid, signum)
    output = ended(begun)
    assert servers(task / "runs" / name) == [] and list(shared.iterdir()) == []
    (line,) = re.findall("^stopped by .*$", output, re.MULTILINE)
    (last,) = checkpoints(task, name)
    told = f"the last checkpoint is runs/{name}/checkpoints/{last}; the same command goes on from there"
    assert line == f"stopped by {signum.name}: {told}" and "[rank" not in output, output
    assert_told("SIGTERM or stop file", output)
    (notice,) = re.findall(f"^{signum.name}: the run saves a checkpoint.*$", output, re.MULTILINE)
    assert "torchrun waits 30 s for it" in notice, output
    assert output.count("Traceback") == 1, output  # torchrun's own
    rows = (task / "runs" / name / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == int(last.removeprefix("step_")) and not (task / "runs" / name / ".lock").exists()


def test_ranks_end_after_their_torchrun_is_killed_and_until_then_no_other_run_may_use_the_folder(
    task, tmp_path, shared
):
    options = ["name=orphans", "num_rollout_steps=1000"]
    begun = start(tmp_path, task, *options, processes=2)
    folder = task / "runs/orphans"
    wait_for(lambda: checkpoints(task, "orphans") or begun.poll() is not None, 300)
    second = ended(start(tmp_path, task, *options, "rollout.engine=embedded"))
    assert "error: another run is using runs/orphans: process " in second and "Traceback" not in second, second
    assert_told("two runs in one folder", second)
    assert not list(task.glob("runs/orphans.old*"))
    ranks = children(begun.pid)
    assert len(ranks) == 2
    begun.kill()
    wait_for(lambda: not any(alive(pid) for pid in ranks) and not servers(folder), 60)
    assert list(shared.iterdir()) == [] and not (folder / ".lock").exists()
    assert "torchrun is gone, so its ranks end: the last checkpoint is runs/orphans/checkpoints/" in ended(begun)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def checkpoints(task: Path, name: str) -> list[str]:
    folder = task / "runs" / name / "checkpoints"
    return sorted(path.name for path in folder.glob("step_??????"))


def test_a_finished_run_is_left_as_it_is_and_a_changed_one_keeps_the_earlier_configuration(task, tmp_path, shared):
    (tmp_path / "program.py").write_text(SEVERAL)
    cases = ["num_rollout_steps=1", "num_rollout_steps=1 optimizer.lr=0.5", "num_rollout_steps=2 optimizer.lr=0.5"]
    options = ["name=done", "rollout.engine=embedded", "checkpoint.export_at_end=true"]
    begun = start(tmp_path, task, *options, program=(str(tmp_path / "program.py"),), CASES=",".join(cases))
    output = ended(begun)
    assert begun.returncode == 0, output
    once, again, further = (task / f"done.{number}" for number in range(3))
    before, first, second = contents(once), *output.split("ENDED\n")[1:3]
    assert {Path("config.yaml"), Path("hf/final/model.safetensors")} <= before.keys()
    assert "nothing to do, and nothing changed: rollout step 1 of runs/done is done" in first
    assert contents(again) == before
    kept = "config.step_000001.yaml"
    assert (
        f"the configuration has changed in num_rollout_steps, optimizer.lr: runs/done/{kept} held until rollout step 1"
        in second
    )
    assert contents(further)[Path(kept)] == before[Path("config.yaml")]
    assert "lr: 0.5\n" in (further / "config.yaml").read_text()


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Return the time of change and the content of every file."""
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }
