"""A rank's handle of the process that writes its shards (saver.py), and the memory that both share.

Change here: how a snapshot is taken, and how the rank learns of the process's end.

The memory is a file without a name (memfd): no path stays behind after a kill, the size of /dev/shm does not matter, and the kernel
frees it when both processes are gone. It is copied before training goes on, and nothing else writes into it.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from dapo_mcore.checkpoint.publish import Publication
from dapo_mcore.checkpoint.snapshot import Snapshot
from dapo_mcore.errors import ResourceError

_LENGTH = 8
_KILL_S = 5.0
_SEND_S = 60.0
"""A job has a line for each slice, more than a socket's buffer holds: a process that hangs would not take it."""


class SharedMemory:
    """Host memory of `num_bytes` that another process can map through `descriptor`. Pinned where there is a CUDA device.

    Raise ResourceError if the machine does not have it.
    """

    def __init__(self, num_bytes: int):
        self.num_bytes = num_bytes
        self.descriptor = os.memfd_create("dapo_mcore-checkpoint")
        try:
            os.posix_fallocate(self.descriptor, 0, num_bytes)
        except OSError as error:
            os.close(self.descriptor)
            raise ResourceError(
                f"this rank's part of a checkpoint, {num_bytes / 2**30:.1f} GiB, does not fit into host memory "
                f"({error.strerror}); set checkpoint.async_save false"
            ) from error
        self._map = mmap.mmap(self.descriptor, num_bytes)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self.is_pinned = torch.cuda.is_available() and _pin(self.bytes)

    def close(self) -> None:
        if self.is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr())
        self.bytes = torch.empty(0)
        with suppress(BufferError):  # a view is left: the map ends with it
            self._map.close()
        os.close(self.descriptor)


class SaverProcess:
    """The process of one rank. It has at most one job."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(_SEND_S)
        command = [sys.executable, "-m", "dapo_mcore.checkpoint.saver", str(theirs.fileno())]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        with theirs:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
                process_group=0,  # Ctrl-C is for the ranks
            )
        self._memory: SharedMemory | None = None
        self._states: list[str] = []
        self.warnings: list[str] = []

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self, snapshot: Snapshot, shards: str, rank: int, publication: Publication | None) -> None:
        """Copy the snapshot and let the process write it. When this returns, training may go on.

        The copy is owned: later changes of the tensors do not reach the file. Waits for the device, where there is one.
        """
        if self._memory is None or self._memory.num_bytes != snapshot.num_bytes:
            self._free()
            self._memory = SharedMemory(snapshot.num_bytes)
        snapshot.copy_to(self._memory.bytes, non_blocking=self._memory.is_pinned)
        job = {
            "shards": shards,
            "rank": rank,
            "header_bytes": len(snapshot.header),
            "slices": snapshot.slices,
            "publication": publication and [str(publication.partial), str(publication.folder), *publication[2:]],
        }
        self._states, self.warnings = [], []
        text = json.dumps(job).encode()
        # if the process is gone or hangs, `wait` says so
        with suppress(OSError):
            socket.send_fds(self._socket, [len(text).to_bytes(_LENGTH, "little")], [self._memory.descriptor])
            self._socket.sendall(text)

    def wait(self, state: str, stall_s: float) -> str | None:
        """Wait until the job is `written` or `done`. Return why it never will be, or None.

        stall_s   seconds without any sign of progress that are a problem
        """
        while state not in self._states:
            message = self._receive(stall_s)
            if message is None:
                return f"the process that writes it has shown no progress for {stall_s:.0f} s"
            if message["state"] == "gone":
                return f"the process that writes it has ended ({self._ended()})"
            if message["state"] == "failed":
                return str(message["reason"])
            self._states.append(message["state"])
            self.warnings += message.get("warnings", [])
        return None

    def close(self, patience_s: float = 0.0) -> None:
        """End the process, after its job if that takes at most `patience_s`. May be called twice."""
        deadline = time.monotonic() + patience_s
        while self._memory is not None and "done" not in self._states and (left := deadline - time.monotonic()) > 0:
            if self.wait("done", left) is not None:
                break
        self._socket.close()
        self._process.kill()
        # a process that waits for a dead disk ends only when that answers
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_KILL_S)
        self._free()

    def _ended(self) -> str:
        status = self._process.wait()
        return f"signal {-status}" if status < 0 else f"exit status {status}"

    def _receive(self, timeout_s: float) -> dict[str, Any] | None:
        """Return the next message, {"state": "gone"} if there will be none, None after `timeout_s` without one."""
        try:
            if not select.select([self._socket], [], [], timeout_s)[0]:
                return None
            if not (head := self._socket.recv(_LENGTH, socket.MSG_WAITALL)):
                return {"state": "gone"}
            return json.loads(self._socket.recv(int.from_bytes(head, "little"), socket.MSG_WAITALL))
        except OSError:
            return {"state": "gone"}

    def _free(self) -> None:
        if self._memory is not None:
            self._memory.close()
        self._memory = None


def _pin(memory: Tensor) -> bool:
    """Register host memory with CUDA, so that copies into it need no second buffer. Return True if CUDA takes it."""
    return int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)) == 0
