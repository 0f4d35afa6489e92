"""The weight stream to servers by a broadcast that they receive, over NCCL or gloo.

Change here: the process groups, and how gathering and sending overlap. Fleet.update makes it a transaction.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from datetime import timedelta
from functools import partial
from typing import Literal

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from dapo_mcore.errors import RolloutError
from dapo_mcore.rollout.manifest import Bucket
from dapo_mcore.rollout.sglang.fleet import Fleet, Transaction
from dapo_mcore.rollout.sglang.http import RequestFailed, RequestRefused
from dapo_mcore.rollout.sglang.loop_thread import LoopThread
from dapo_mcore.rollout.sglang.member import Member


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
        ready: asyncio.Queue[tuple[Bucket, bool] | Exception] = asyncio.Queue(maxsize=1)
        update = loop.submit(fleet.update(tag, lambda transaction: self._broadcast(transaction, ready)))
        num_bytes = 0
        try:
            for bucket, last in buckets:
                num_bytes += sum(tensor.nbytes for _, tensor in bucket)
                _hand_over((bucket, last), ready, update, loop)
        except BaseException as error:
            _hand_over(RolloutError(f"the weight stream broke off: {error!r}"), ready, update, loop)
            wait([update])
            raise
        update.result()
        return {"sync/broadcast_s": time.perf_counter() - start, "sync/bytes": float(num_bytes)}

    def close(self) -> None:
        """Nothing: the groups end with the servers or with this process."""

    async def _broadcast(self, transaction: Transaction, ready: asyncio.Queue) -> None:
        await transaction.each("join", self._join)
        await transaction.each("begin", _begin)
        last = False
        while not last:
            item = await ready.get()
            if isinstance(item, Exception):
                raise item
            bucket, last = item
            final_version = transaction.tag if last else None
            await transaction.each("receive", partial(_send_bucket, bucket, final_version))
            ready.task_done()
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


async def _begin(member: Member) -> None:
    try:
        await member.api.begin_update()
    except RequestRefused:  # left open by an update that was broken off
        await member.api.end_update()
        await member.api.begin_update()


async def _send_bucket(bucket: Bucket, final_version: str | None, member: Member) -> None:
    received = member.api.receive(bucket, member.link.name, final_version)
    try:
        await asyncio.gather(received, asyncio.to_thread(member.link.broadcast, bucket))
    except RuntimeError as error:  # torch's word for a peer that is gone or silent
        raise RequestFailed(f"the broadcast to {member.api.url} failed: {error}") from error


def _hand_over(item: tuple[Bucket, bool] | Exception, ready: asyncio.Queue, update: Future, loop: LoopThread) -> None:
    """Waits until the bucket before is sent, unless nobody will take this one any more."""

    async def put() -> None:
        await ready.join()
        await ready.put(item)

    handed = loop.submit(put())
    wait([handed, update], return_when=FIRST_COMPLETED)
    if not handed.done():
        handed.cancel()
