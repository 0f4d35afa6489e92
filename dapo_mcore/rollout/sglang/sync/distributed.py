"""The weight stream to servers by a broadcast that they receive, over NCCL or gloo.

Change here: which servers receive together. The groups are server_group.py; stream.py overlaps gathering and sending;
Fleet.update makes it a transaction.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Literal

import torch

from dapo_mcore.architecture.manifest import Bucket
from dapo_mcore.errors import ConfigError, UpdateBroken
from dapo_mcore.rollout.sglang.client.address import elsewhere, is_loopback
from dapo_mcore.rollout.sglang.client.loop_thread import LoopThread
from dapo_mcore.rollout.sglang.pool.pool import Fleet
from dapo_mcore.rollout.sglang.pool.server import Member
from dapo_mcore.rollout.sglang.pool.transaction import Transaction
from dapo_mcore.rollout.sglang.sync.server_group import ServerGroup
from dapo_mcore.rollout.sglang.sync.stream import Parcels, send_stream

_CLOSE_S = 5.0
_TOGETHER = 2
"""Tries of an update before each server is on its own, as the last try of actor/weight_stream.py then is."""

Part = tuple[Member, ...]
"""Members that receive together."""


def check_sync_host(host: str, urls: Sequence[str]) -> None:
    """Nothing; raises ConfigError when servers at `urls` would look for the trainer on their own machines: they would
    try for sync_timeout_s."""
    if is_loopback(host) and (strangers := elsewhere(urls)):
        raise ConfigError(
            f"rollout.sglang.sync distributed gives servers the address sync_host {host}, by which only this machine "
            f"reaches the trainer, but {len(strangers)} of {len(urls)} servers are on others: {', '.join(strangers)}; set "
            "sync_host to the trainer's address in the cluster"
        )


class BroadcastTransfer:
    """Weights by broadcasts from this process, one for each group of servers.

    Nothing is kept, so a server that was out gets weights at the next update. The gather of a bucket overlaps with the
    sending of the one before it: two buckets are in memory. A group lasts as long as its servers are the same and well.

    servers_per_group   None for all: the most servers for one pass of the weights. A server that dies or refuses breaks the
                        broadcast for its whole group; when that leaves no server, the fleet raises UpdateBroken. Broken
                        twice in a row, the update is tried with each server in a group of its own.
    """

    resync = None
    empty = staticmethod(torch.empty)

    def __init__(
        self, host: str, backend: Literal["nccl", "gloo"], timeout_s: float, servers_per_group: int | None = None
    ):
        self._host, self._backend, self._timeout = host, backend, timedelta(seconds=timeout_s)
        self._servers_per_group, self._num_broken = servers_per_group, 0
        self._groups: list[ServerGroup] = []
        self._dropped: list[ServerGroup] = []
        self._joining = asyncio.Lock()

    def send(
        self, buckets: Iterator[tuple[Bucket, bool]], tag: str, fleet: Fleet, loop: LoopThread
    ) -> dict[str, float]:
        """Metrics of the update that gave every serving server the stream's weights."""
        start = time.perf_counter()
        try:
            num_bytes = send_stream(buckets, tag, fleet, loop, partial(self._broadcast, fleet))
        except UpdateBroken:
            self._num_broken += 1
            raise
        self._num_broken = 0
        return {"sync/broadcast_s": time.perf_counter() - start, "sync/bytes": num_bytes}

    def close(self) -> None:
        """Waits a while for the groups to end: a process that exits in the middle of that is aborted by C++."""
        groups, self._groups = self._groups, []
        end = time.monotonic() + _CLOSE_S
        for thread in [group.close() for group in groups]:
            thread.join(max(end - time.monotonic(), 0.0))

    async def _broadcast(self, fleet: Fleet, transaction: Transaction, parcels: Parcels[Bucket]) -> None:
        await self._regroup(fleet.members, transaction)
        await transaction.parts("begin", {group.members: group.begin() for group in self._receiving()})
        async for bucket, version in parcels:
            await transaction.parts("receive", {g.members: g.send(bucket, version) for g in self._receiving()})
            if not transaction.members:
                break
        await transaction.each("end", lambda m: m.api.end_update())

    def _receiving(self) -> list[ServerGroup]:
        return [group for group in self._groups if group.is_whole]

    async def _regroup(self, everybody: list[Member], transaction: Transaction) -> None:
        """Groups of exactly the members that take part: those that still fit are kept."""
        parts = self._parts(everybody, transaction.members)
        kept = [group for group in self._receiving() if group.members in parts]
        for group in self._groups:
            if group not in kept:
                group.close()
                self._dropped.append(group)
        self._groups = kept
        await transaction.each("leave", self._leave)
        self._dropped = [group for group in self._dropped if group.remain]
        grouped = {group.members for group in kept}
        new = [part for part in self._parts(everybody, transaction.members) if part not in grouped]
        await transaction.parts("join", {part: self._join(part) for part in new})

    def _parts(self, everybody: list[Member], taking_part: list[Member]) -> list[Part]:
        """By place in the fleet, so that one server's absence changes its own part alone."""
        size = 1 if self._num_broken >= _TOGETHER else self._servers_per_group or len(everybody)
        parts = [everybody[start : start + size] for start in range(0, len(everybody), size)]
        present = [tuple(member for member in part if member in taking_part) for part in parts]
        return [part for part in present if part]

    async def _leave(self, member: Member) -> None:
        for group in self._dropped:
            if member in group.remain:
                await group.leave(member)

    async def _join(self, part: Part) -> None:
        async with self._joining:  # torch registers groups in tables without a lock
            group = ServerGroup(part, self._host, self._backend, self._timeout)
            self._groups.append(group)
            await group.join()
