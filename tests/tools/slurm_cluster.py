"""A real Slurm cluster of several nodes on this machine, for tests of jobs. Needs root and Debian's package slurm-wlm.

Its nodes share one host name and one address, so everything on them must have ports of its own.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

from tests.rollout.sglang.serving import wait_for

GPUS = 2
"""GPUs of a node: copies of /dev/null. Slurm only counts them, and tells their numbers to steps that ask for them."""
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")


def missing() -> str | None:
    """Return why no cluster can be started here; None if one can."""
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    if lacking:
        return f"needs {', '.join(lacking)} (Debian's package slurm-wlm)"
    return None if os.geteuid() == 0 else "needs root"


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def configuration(folder: Path, nodes: int) -> str:
    controller, *ports = free_ports(nodes + 1)
    host = socket.gethostname()
    settings = {
        "ClusterName": "test",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": controller,
        "SlurmUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": "cred_expire=5",  # a requeued job waits as long, 120 s by default
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool-%n",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd-%n.pid",
        "SlurmctldLogFile": folder / "slurmctld.log",
        "SlurmdLogFile": folder / "slurmd-%n.log",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/affinity",
        "SchedulerParameters": "sched_interval=2,bf_interval=2",  # looks for jobs to start as often, 60 s by default
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "GresTypes": "gpu",
        "KillWait": 10,  # from scancel's SIGTERM to SIGKILL, 30 s by default
        "ReturnToService": 2,
    }
    lines = [f"{key}={value}" for key, value in settings.items()]
    lines += [
        f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={os.cpu_count()} RealMemory=2000 "
        f"Gres=gpu:{GPUS} CpuBind=core State=UNKNOWN"
        for i, port in enumerate(ports)
    ]
    return "\n".join([*lines, "PartitionName=p Nodes=ALL Default=YES MaxTime=INFINITE State=UP", ""])


@contextmanager
def slurm_cluster(folder: Path, nodes: int) -> Iterator[dict[str, str]]:
    """Start a cluster, yield the environment variables that name it, and stop it."""
    (folder / "state").mkdir(parents=True)
    (folder / "slurm.conf").write_text(configuration(folder, nodes))
    gpus = [folder / f"gpu{i}" for i in range(GPUS)]
    for gpu in gpus:
        os.mknod(gpu, stat.S_IFCHR | 0o600, os.stat("/dev/null").st_rdev)
    (folder / "gres.conf").write_text("".join(f"Name=gpu File={gpu}\n" for gpu in gpus))
    environment = {"SLURM_CONF": str(folder / "slurm.conf")}
    started = subprocess.run(["munge", "-n"], capture_output=True).returncode != 0
    if started:
        Path("/run/munge").mkdir(exist_ok=True)
        shutil.chown("/run/munge", "munge")
        subprocess.run(["runuser", "-u", "munge", "--", "munged"], check=True)
    try:
        for command in (["slurmctld"], *(["slurmd", "-N", f"n{i}"] for i in range(nodes))):
            subprocess.run(command, env=os.environ | environment, check=True)
        wait_for(lambda: idle_nodes(environment) == nodes, 60)
        yield environment
    finally:
        call = partial(subprocess.run, env=os.environ | environment, capture_output=True)
        call(["scancel", "--partition=p"])  # after a failed test
        wait_for(lambda: not call(["squeue", "--noheader"]).stdout, 60)
        for file in folder.glob("*.pid"):
            with closing(file.open()) as opened:
                os.kill(int(opened.read()), signal.SIGTERM)
        if started:
            os.kill(int(Path("/run/munge/munged.pid").read_text()), signal.SIGTERM)


def idle_nodes(environment: dict[str, str]) -> int:
    command = ["sinfo", "--noheader", "--Node", "--states=idle"]
    found = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    return len(found.stdout.splitlines()) if found.returncode == 0 else 0
