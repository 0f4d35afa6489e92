"""A job whose processes are nodes: each is the parent of its own servers, and the first one's relays reach the others."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from dapo_mcore.rollout.sglang.launch.node_servers import NodeHost
from dapo_mcore.rollout.sglang.sync.relay import Relay, RelayGroup, Relays

CPU = torch.device("cpu")


class Node:
    """One process of the job.

    nodes          of the job, for an engine on rank 0.
    relays, peer   the two ends of a sync: on rank 0, and elsewhere.
    layout         what handover.sync_weights needs of one.
    """

    def __init__(self, rank: int, size: int, folder: Path):
        self.rank, self.size, self.folder = rank, size, folder
        self.host = NodeHost("127.0.0.1", "a" * 64, rank)
        self.nodes: list[Any] = [None] * size
        dist.all_gather_object(self.nodes, self.host.node)
        group = RelayGroup(range(size), CPU, timedelta(seconds=60))
        self.relays, self.peer = (Relays(group), None) if rank == 0 else (None, Relay(group))
        self.layout = SimpleNamespace(broadcast_object=broadcast_object)


Job = Callable[[Node], Any]


def broadcast_object(value: Any) -> Any:
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def run_job(job: Job, size: int, folder: Path, timeout_s: float = 90) -> list[int | None]:
    """Run `job` in `size` processes. Return their exit codes; the file `told` has what it returned on rank 0, or its error."""
    with started(job, size, folder) as processes:
        for process in processes:
            process.join(timeout_s)
        return [process.exitcode for process in processes]


@contextmanager
def started(job: Job, size: int, folder: Path) -> Iterator[list[Any]]:
    """Start `job` in `size` processes, and kill those that are left after the block."""
    context = multiprocessing.get_context("forkserver")
    multiprocessing.set_forkserver_preload(["tests.rollout.sglang.serving"])
    (folder / "told").write_text("nothing")
    processes = [context.Process(target=enter, args=(job, rank, size, folder)) for rank in range(size)]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def enter(job: Job, rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    try:
        told = job(Node(rank, size, folder))
    except BaseException as error:
        if rank == 0:
            (folder / "told").write_text(repr(error))
        raise
    if rank == 0:
        (folder / "told").write_text(json.dumps(told))
