"""The process that writes a rank's shards beside training. On rank 0 it also publishes the checkpoint.

Change here: what it does with a job, and when it gives up. background.py starts it and sends it jobs. It is a program of its own,
not a fork of the rank, so it shares neither threads nor a CUDA context with it. Nothing here imports torch.

    python -m dapo_mcore.checkpoint.saver DESCRIPTOR     a Unix socket, on which come jobs and go messages

    job       JSON {shards, rank, header_bytes, slices, publication}, and the descriptor of a memory that holds the file's bytes
    messages  JSON: {"state": "writing"} for each piece, {"state": "written"}, then, on rank 0 after it has published the checkpoint,
              {"state": "done", "warnings": […]}; or, at any point, {"state": "failed", "reason": …}
The rank's end closes the socket. The process then ends at once and publishes nothing: another start may already use the folder.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dapo_mcore.checkpoint.best import Best
from dapo_mcore.checkpoint.publish import Publication, publish
from dapo_mcore.checkpoint.shard_file import PIECE, PlannedSlice, write_shard
from dapo_mcore.errors import DapoError

_LENGTH = 8


def main(descriptor: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # a signal to the whole job is for the ranks, which decide
    connection = Connection(socket.socket(fileno=descriptor))
    with suppress(RankIsGone):
        while True:
            job, memory = connection.receive_job()
            try:
                _work(job, memory, connection)
            except (DapoError, OSError, ValueError, MemoryError) as error:
                connection.send({"state": "failed", "reason": _reason(error)})
            finally:
                os.close(memory)


class RankIsGone(Exception):
    """The rank has closed the socket: it has ended, or it gives up this process."""


class Connection:
    """Frames of JSON over a stream socket."""

    def __init__(self, stream: socket.socket):
        self._socket = stream

    def receive_job(self) -> tuple[dict[str, Any], int]:
        """Wait for a job. Return it with the descriptor of its memory."""
        with _gone_named():
            head, descriptors, _, _ = socket.recv_fds(self._socket, _LENGTH, 1)
        if not head:
            raise RankIsGone
        head += self._receive(_LENGTH - len(head))
        (memory,) = descriptors
        return json.loads(self._receive(int.from_bytes(head, "little"))), memory

    def send(self, message: dict[str, Any], urgent: bool = True) -> None:
        """Send a message. One that is not urgent is dropped while the rank reads none."""
        if not urgent and not select.select([], [self._socket], [], 0)[1]:
            return
        text = json.dumps(message).encode()
        with _gone_named():
            self._socket.sendall(len(text).to_bytes(_LENGTH, "little") + text)

    def check(self) -> None:
        """Raise RankIsGone if the socket is closed. While a job runs, the rank sends nothing."""
        if select.select([self._socket], [], [], 0)[0]:
            raise RankIsGone

    def _receive(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            with _gone_named():
                part = self._socket.recv(min(count - len(parts), 1 << 20))
            if not part:
                raise RankIsGone
            parts += part
        return bytes(parts)


@contextmanager
def _gone_named() -> Iterator[None]:
    """A rank that ends with messages unread resets the connection instead of closing it."""
    try:
        yield
    except OSError as error:
        raise RankIsGone from error


def _reason(error: Exception) -> str:
    system = error.strerror if isinstance(error, OSError) else None
    return system or str(error) or repr(error)


def _work(job: dict[str, Any], memory: int, connection: Connection) -> None:
    def check() -> None:
        connection.check()
        connection.send({"state": "writing"}, urgent=False)

    slices = [PlannedSlice(*planned) for planned in job["slices"]]
    warnings: list[str] = []
    # freed with its last piece: an error of the disk still holds one, and a map that is closed under it would hide the error
    view = memoryview(mmap.mmap(memory, 0, prot=mmap.PROT_READ))

    def pieces(planned: PlannedSlice) -> Iterator[memoryview]:
        stop = planned.start + planned.num_bytes
        for start in range(planned.start, stop, PIECE):
            yield view[start : min(stop, start + PIECE)]

    write_shard(Path(job["shards"]), job["rank"], bytes(view[: job["header_bytes"]]), slices, pieces, check)
    connection.send({"state": "written"})
    if job["publication"] is not None:
        partial, folder, num_ranks, keep, best = job["publication"]
        publication = Publication(Path(partial), Path(folder), num_ranks, keep, best and Best(*best))
        publish(publication, warnings.append, connection.check)
    connection.send({"state": "done", "warnings": warnings})


if __name__ == "__main__":
    main(int(sys.argv[1]))
