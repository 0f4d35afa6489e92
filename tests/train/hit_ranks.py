"""Start two ranks again and again, and hit one of them each time: python -m tests.train.hit_ranks HITS ARGUMENTS

HITS is a JSON list of [rank, place, how], or [] for a start that is left alone. The ranks are forks of this process, which has imported
everything once: importing takes longer than a run. This process does what torchrun does when a rank ends.

A hit comes in the second rollout step of a start, so each start gets further than the one before. How: a signal for the rank itself,
but SIGTERM for both; "disk full"; or the text of another error.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dapo_mcore.actor import forward_backward
from dapo_mcore.actor.optimizer import Optimizer
from dapo_mcore.actor.weight_stream import WeightStream
from dapo_mcore.checkpoint import checkpoint
from dapo_mcore.process import watchdog
from dapo_mcore.process.hang import Limits
from dapo_mcore.process.launcher import ranks_here
from dapo_mcore.train import loop
from dapo_mcore.train.__main__ import main

_GRACE_S = 120.0  # more than a busy machine takes, so only a rank that waits for ever is killed
_PLACES = {
    "forward": (forward_backward, "_forward_step"),
    "backward": (forward_backward, "_forward_step"),
    "optimizer": (Optimizer, "step"),
    "sync": (WeightStream, "__call__"),
    "save": (checkpoint, "write_shard"),
    "scatter": (loop, "scatter_step"),
}


def hit(place: str, how: str) -> None:
    """Let this rank be hit."""
    struck, rollout_steps = [], []

    def strike(*_: Any) -> None:
        if not struck:
            struck.append(True)
            _strike(how)

    def hits(function: Callable[..., Any], *given: Any, **more: Any) -> Any:
        armed = len(rollout_steps) >= 2
        if armed and place != "backward":
            strike()
        result = function(*given, **more)
        if armed and place == "backward" and torch.is_grad_enabled():
            result[0].register_hook(strike)
        return result

    def counts(function: Callable[..., Any], *given: Any, **more: Any) -> Any:
        rollout_steps.append(True)
        return function(*given, **more)

    _wrap(*_PLACES[place], hits)
    _wrap(loop, "scatter_step", counts)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    function = getattr(owner, name)
    setattr(owner, name, lambda *given, **more: wrapper(function, *given, **more))


def _strike(how: str) -> None:
    if how == "SIGTERM":  # as torchrun passes it on
        for rank in ranks_here(os.environ):
            os.kill(rank, signal.SIGTERM)
    elif how.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, how))
    elif how == "disk full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    else:
        raise ValueError(how)


def run(rank: int, port: int, target: list[Any], arguments: list[str]) -> int:
    """Be a rank of a job of two, and return its exit status."""
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        **{"GROUP_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "hit"},
        "TORCHELASTIC_ERROR_FILE": f"error-{rank}.json",
    }
    if target and rank == target[0]:
        hit(*target[1:])
    if "SIGSTOP" in target:
        watchdog.Limits = lambda minutes: Limits(minutes, dead_s=1.0)
    try:
        return main(arguments)
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1


def start(target: list[Any], arguments: list[str]) -> dict[str, Any]:
    """Run the job, and return the statuses of its ranks and what torchrun would print of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(2):
        Path(f"error-{rank}.json").unlink(missing_ok=True)
    ranks = {}
    for rank in range(2):
        if (pid := os.fork()) == 0:
            status = run(rank, port, target, arguments)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        ranks[pid] = rank
    statuses = _wait(ranks)
    errors = [Path(f"error-{rank}.json") for rank in range(2)]
    told = [json.loads(file.read_text())["message"]["message"] if file.exists() else None for file in errors]
    return {"statuses": [statuses[rank] for rank in range(2)], "told": told}


def _wait(ranks: dict[int, int]) -> dict[int, int]:
    """Return the exit status of each rank. Once one has failed, the others get SIGTERM, and SIGKILL if they do not end."""
    statuses: dict[int, int] = {}
    deadline = float("inf")
    while len(statuses) < len(ranks):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in ranks:
            statuses[ranks[pid]] = os.waitstatus_to_exitcode(status)
        here = [pid for pid in ranks if ranks[pid] not in statuses]
        if any(statuses.values()) and deadline == float("inf"):
            deadline = time.monotonic() + _GRACE_S
            _signal(here, signal.SIGTERM)
        if time.monotonic() > deadline:
            _signal(here, signal.SIGKILL)
        time.sleep(0.05)
    return statuses


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


if __name__ == "__main__":
    for target in json.loads(sys.argv[1]):
        begin = time.monotonic()
        ended = start(target, sys.argv[2:])
        print("ENDED", json.dumps(ended | {"seconds": round(time.monotonic() - begin, 1)}), flush=True)
