"""This process's end of a process group with rollout servers: rank 0, which sends.

Change here: how torch's group is opened, used and given up. Which servers are in it is in distributed.py.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from dapo_mcore.architecture.manifest import Bucket

_POLL_S = 0.001
_ON_ERROR = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


class RootRank:
    """Rank 0 of a group. SGLang's `init_custom_process_group` makes the other ranks. `name` is unique in the process.

    `open` and `broadcast` block, so run them in threads of their own (`in_daemon`). `close` may be called from another
    thread at any time and ends them; on gloo only once no send is on its way to a silent server.
    """

    def __init__(self, name: str, host: str, world_size: int, backend: str, timeout: timedelta):
        self.name, self.world_size, self.backend = name, world_size, backend
        self.host, self._timeout = host, timeout
        self._store: dist.TCPStore | None = None
        self._group: dist.ProcessGroup | None = None
        self._closed = False
        # TCPStore by itself listens on every interface
        self._listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.port = self._listener.getsockname()[1]

    def open(self) -> None:
        """Wait until gloo has connected every rank; NCCL connects at the first broadcast. Raise RuntimeError if one fails."""
        rest = dict(world_size=self.world_size, timeout=self._timeout)
        # The store's server and our client of it are separate: dropping the server ends every wait for a missing rank.
        self._store = dist.TCPStore(
            self.host,
            self.port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=self._listener.detach(),
            **rest,
        )
        if self._closed:
            raise RuntimeError(f"process group {self.name} was given up")
        store = c10d.PrefixStore(self.name, dist.TCPStore(self.host, self.port, is_master=False, **rest))
        backend = c10d.Backend(self.backend)
        with _outlives_its_peers(self.backend):
            group, _ = c10d._new_process_group_helper(
                self.world_size, 0, [], backend, store, group_name=self.name, timeout=self._timeout
            )
        c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(self.world_size)}  # for its destruction
        self._group = group
        if self._closed:
            self.close()

    def broadcast(self, bucket: Bucket) -> None:
        """Send every tensor and wait until that is done. Raise RuntimeError if a rank is gone or silent.

        Collective: one broadcast per tensor over this group.
        """
        group, tensors = self._group, [tensor.contiguous() for _, tensor in bucket]
        if group is None:
            raise RuntimeError(f"process group {self.name} is closed")
        works = [group.broadcast(tensor, 0) for tensor in tensors]
        for work in works:
            work.wait()
        while not all(work.is_completed() for work in works):  # NCCL's wait only orders the stream
            if self._closed:
                raise RuntimeError(f"process group {self.name} was given up")
            time.sleep(_POLL_S)

    def close(self) -> None:
        """End the group: calls that wait in it, here and at the servers, fail. May be called twice."""
        self._closed, self._store = True, None
        group, self._group = self._group, None
        if group is not None:
            group.abort()  # NCCL's kernels; gloo closes its connections with the last reference
            dist.destroy_process_group(group)

    def close_soon(self) -> threading.Thread:
        """Close in a new thread and return that thread: aborting NCCL may take its time."""
        thread = threading.Thread(target=self.close, name=f"close {self.name}", daemon=True)
        thread.start()
        return thread


@contextmanager
def _outlives_its_peers(backend: str) -> Iterator[None]:
    """Let NCCL groups that are made inside abort themselves if a server dies. By torch's default this process would end."""
    before = os.environ.get(_ON_ERROR)
    if backend == "nccl":
        os.environ[_ON_ERROR] = "2"
    try:
        yield
    finally:
        if before is not None:
            os.environ[_ON_ERROR] = before
        else:
            os.environ.pop(_ON_ERROR, None)


def in_daemon(call: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
    """Run the call like asyncio.to_thread, but in a daemon thread: a call that never returns must not keep the process alive."""
    return asyncio.wrap_future(daemon(call, *arguments))


def daemon(call: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Start the call in a daemon thread and return its future."""
    future: Future[Any] = Future()

    def run() -> None:
        future.set_running_or_notify_cancel()
        try:
            future.set_result(call(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=f"group {call.__name__}", daemon=True).start()
    return future
