"""The launcher of this process: torchrun, a cluster's task launcher such as srun, or none.

Change here: which launchers are known, and what happens when torchrun dies before its ranks.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from dapo_mcore.errors import ConfigError

_REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NUMBERS = ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_TASK_LAUNCHERS = {
    "srun": (("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), "SLURM_PROCID"),
    "mpirun": (("OMPI_COMM_WORLD_SIZE",), "OMPI_COMM_WORLD_RANK"),
    "mpiexec": (("PMI_SIZE",), "PMI_RANK"),
}
"""By launcher: the variables with the number of tasks (the first one that is set counts), and the task's own number."""
_POLL_S = 0.5


def check_launcher(environment: Mapping[str, str]) -> None:
    """Raise ConfigError if the environment gives this process no valid rank, or if it is one of several tasks that do not
    know of each other: each task would be a whole run."""
    given = [name for name in ("RANK", "WORLD_SIZE") if name in environment]
    if given:
        _check_variables(environment, given)
        return
    for launcher, (size_names, rank_name) in _TASK_LAUNCHERS.items():
        size = next((environment[name] for name in size_names if name in environment), "1")
        if rank_name in environment and size != "1":
            raise ConfigError(
                f"{launcher} has started {size} tasks of this program, and each would be a whole run; let it start one "
                "torchrun on each node (srun --ntasks-per-node=1 torchrun --nnodes … -m dapo_mcore.train …), or for a run of "
                f"one process set {'SLURM_NTASKS=1' if launcher == 'srun' else f'one task ({launcher} -n 1)'}"
            )


def watch_launcher(environment: Mapping[str, str], on_lost: Callable[[], None]) -> None:
    """Call `on_lost` in a thread when the torchrun that started this process has died. Its ranks would otherwise live on.

    If torchrun dies before this call, joining the job fails, because torchrun holds the ranks' rendezvous store.
    """
    if not is_torchrun(environment):
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_S)
        on_lost()

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def routed_address(environment: Mapping[str, str]) -> str:
    """Return the address of this machine on the way to the job's first one (MASTER_ADDR): the others reach it there."""
    first = environment.get("MASTER_ADDR", "127.0.0.1")
    family, kind, *_, address = socket.getaddrinfo(first, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing
        return probe.getsockname()[0]


def ranks_here(environment: Mapping[str, str]) -> list[int]:
    """Return the process ids of the ranks that this rank's torchrun has started; none without torchrun."""
    if not is_torchrun(environment):
        return []
    children = Path(f"/proc/{os.getppid()}/task").glob("*/children")
    return [int(word) for file in children for word in file.read_text().split()]


def shutdown_timeout_note(environment: Mapping[str, str]) -> str:
    """Return a clause that says how long the launcher waits after a signal before it kills this process; empty if there is
    no limit."""
    return "; torchrun waits 30 s for it, or --shutdown-timeout" if is_torchrun(environment) else ""


def is_torchrun(environment: Mapping[str, str]) -> bool:
    """Return True if torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in environment


def _check_variables(environment: Mapping[str, str], given: list[str]) -> None:
    remedy = f"start by torchrun, which sets them all, or unset {' and '.join(given)} for a run of one process"
    missing = [name for name in _REQUIRED if not environment.get(name)]
    if missing:
        values = ", ".join(f"{name}={environment[name]}" for name in given)
        raise ConfigError(
            f"{values} is set, but {', '.join(missing)} is not, so this process cannot join a job; {remedy}"
        )
    wrong = [f"{name}={environment[name]}" for name in _NUMBERS if not environment.get(name, "0").isdecimal()]
    if wrong:
        raise ConfigError(f"{', '.join(wrong)} must be a whole number, not negative; {remedy}")
    rank, size, port = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if not rank < size or not 0 < port < 65536:
        raise ConfigError(
            f"RANK={rank}, WORLD_SIZE={size}, MASTER_PORT={port}: a rank is below WORLD_SIZE, a port from 1 to 65535; {remedy}"
        )
