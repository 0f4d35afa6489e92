"""What started this process: torchrun, a cluster's task launcher without it, or nobody.

Change here: which launchers are known, and what happens when torchrun dies before its ranks.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping

from dapo_mcore.errors import ConfigError

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NUMBERS = ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_TASK_LAUNCHERS = {
    "srun": (("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), "SLURM_PROCID"),
    "mpirun": (("OMPI_COMM_WORLD_SIZE",), "OMPI_COMM_WORLD_RANK"),
    "mpiexec": (("PMI_SIZE",), "PMI_RANK"),
}
"""Variables with the number of tasks, the first that is set counts, and the one with the task's own number."""
_LOOK_S = 0.5


def check_launcher(environment: Mapping[str, str]) -> None:
    """Raise ConfigError if this process cannot tell its place in the job, or is one of several tasks that can't know of
    each other: each would be a whole run."""
    given = [name for name in ("RANK", "WORLD_SIZE") if name in environment]
    if given:
        _check_variables(environment, given)
        return
    for launcher, (sizes, number) in _TASK_LAUNCHERS.items():
        size = next((environment[name] for name in sizes if name in environment), "1")
        if number in environment and size != "1":
            raise ConfigError(
                f"{launcher} has started {size} tasks of this program, and each would be a whole run; let it start one "
                "torchrun on each node (srun --ntasks-per-node=1 torchrun --nnodes … -m dapo_mcore.train …), or for a run of "
                f"one process set {'SLURM_NTASKS=1' if launcher == 'srun' else f'one task ({launcher} -n 1)'}"
            )


def watch_launcher(environment: Mapping[str, str], on_lost: Callable[[], None]) -> None:
    """Call `on_lost` in a thread when the torchrun that started this process is gone, killed say; ranks would live on.

    One that dies before this call is noticed as the ranks join: it holds the store by which they meet.
    """
    if not _is_torchrun(environment):
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_S)
        on_lost()

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def patience(environment: Mapping[str, str]) -> str:
    """Return how long the launcher waits after a signal before it kills this process, as a clause; empty if nothing limits it."""
    return "; torchrun waits 30 s for it, or --shutdown-timeout" if _is_torchrun(environment) else ""


def _is_torchrun(environment: Mapping[str, str]) -> bool:
    return "TORCHELASTIC_RUN_ID" in environment


def _check_variables(environment: Mapping[str, str], given: list[str]) -> None:
    remedy = f"start by torchrun, which sets them all, or unset {' and '.join(given)} for a run of one process"
    missing = [name for name in _NEEDED if not environment.get(name)]
    if missing:
        told = ", ".join(f"{name}={environment[name]}" for name in given)
        raise ConfigError(
            f"{told} is set, but {', '.join(missing)} is not, so this process has no place in a job; {remedy}"
        )
    wrong = [f"{name}={environment[name]}" for name in _NUMBERS if not environment.get(name, "0").isdecimal()]
    if wrong:
        raise ConfigError(f"{', '.join(wrong)} must be a whole number, not negative; {remedy}")
    rank, size, port = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if not rank < size or not 0 < port < 65536:
        raise ConfigError(
            f"RANK={rank}, WORLD_SIZE={size}, MASTER_PORT={port}: a rank is below WORLD_SIZE, a port from 1 to 65535; {remedy}"
        )
