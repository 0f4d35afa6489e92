"""The weight stream to servers by a broadcast that they receive, over NCCL or gloo.

Change here: the process groups. stream.py overlaps gathering and sending; Fleet.update makes it a transaction.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from typing import Literal

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from dapo_mcore.rollout.manifest import Bucket
from dapo_mcore.rollout.sglang.fleet import Fleet, Transaction
from dapo_mcore.rollout.sglang.http import RequestFailed
from dapo_mcore.rollout.sglang.loop_thread import LoopThread
from dapo_mcore.rollout.sglang.member import Member
from dapo_mcore.rollout.sglang.stream import Parcels, open_session, send_stream


class BroadcastTransfer:
    """Weights by a broadcast from this process, in a process group for each server: one that dies holds up no other.

    Nothing is kept, so a server that was out gets weights at the next update. The gather of a bucket overlaps with the
    sending of the one before it: two buckets are in memory.
    """

    resync = None

    def __init__(self, host: str, backend: Literal["nccl", "gloo"], timeout_s: float):
        self._host, self._backend, self._timeout = host, backend, timedelta(seconds=timeout_s)
        self._joining = asyncio.Lock()

    def send(
        self, buckets: Iterator[tuple[Bucket, bool]], tag: str, fleet: Fleet, loop: LoopThread
    ) -> dict[str, float]:
        """Metrics of the update that gave every serving server the stream's weights."""
        start = time.perf_counter()
        num_bytes = send_stream(buckets, tag, fleet, loop, self._broadcast)
        return {"sync/broadcast_s": time.perf_counter() - start, "sync/bytes": num_bytes}

    def close(self) -> None:
        """Nothing: the groups end with the servers or with this process."""

    async def _broadcast(self, transaction: Transaction, parcels: Parcels[Bucket]) -> None:
        await transaction.each("pause", lambda m: m.api.pause())
        await transaction.each("join", self._join)
        await transaction.each("begin", open_session)
        async for bucket, version in parcels:
            await transaction.each("receive", partial(_send_bucket, bucket, version))
        await transaction.each("end", lambda m: m.api.end_update())

    async def _join(self, member: Member) -> None:
        if member.link is not None:
            return
        async with self._joining:  # torch registers groups in tables without a lock
            link = _Link(
                f"weights-{secrets.token_hex(4)}", self._host, member.num_ranks + 1, self._backend, self._timeout
            )
            joined = member.api.join_group(link.name, self._host, link.port, link.world_size, self._backend)
            await asyncio.gather(joined, asyncio.to_thread(link.open))
        member.link = link


class _Link:
    """This process's end of the group with one server: rank 0; SGLang's `init_custom_process_group` is the other end."""

    def __init__(self, name: str, host: str, world_size: int, backend: str, timeout: timedelta):
        self.name, self.world_size = name, world_size
        self._host, self._backend, self._timeout = host, backend, timeout
        # TCPStore by itself listens on every interface
        self._listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.port = self._listener.getsockname()[1]

    def open(self) -> None:
        store = dist.TCPStore(
            self._host,
            self.port,
            self.world_size,
            is_master=True,
            wait_for_workers=False,
            timeout=self._timeout,
            master_listen_fd=self._listener.detach(),
        )
        self._group, _ = c10d._new_process_group_helper(
            self.world_size,
            0,
            [],
            c10d.Backend(self._backend),
            c10d.PrefixStore(self.name, store),
            group_name=self.name,
            timeout=self._timeout,
        )

    def broadcast(self, bucket: Bucket) -> None:
        for work in [self._group.broadcast(tensor.contiguous(), 0) for _, tensor in bucket]:
            work.wait()


async def _send_bucket(bucket: Bucket, final_version: str | None, member: Member) -> None:
    received = member.api.receive(bucket, member.link.name, final_version)
    try:
        await asyncio.gather(received, asyncio.to_thread(member.link.broadcast, bucket))
    except RuntimeError as error:  # torch's word for a peer that is gone or silent
        raise RequestFailed(f"the broadcast to {member.api.url} failed: {error}") from error
