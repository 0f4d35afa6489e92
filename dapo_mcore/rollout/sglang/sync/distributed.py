"""Weights to servers by broadcasts from this process and from other leaders of the weight stream, over NCCL or gloo.

Change here: which servers receive together, and how a group of them joins, receives and breaks off. torch's process group is
in process_group.py. How the parts of several leaders become one stream is in parts.py.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, ClassVar, Literal

import torch

from dapo_mcore.architecture.manifest import Bucket
from dapo_mcore.errors import ConfigError, RolloutError
from dapo_mcore.rollout.sglang.client.http import RequestFailed, RequestRefused
from dapo_mcore.rollout.sglang.pool.server import Server
from dapo_mcore.rollout.sglang.pool.update import Transaction
from dapo_mcore.rollout.sglang.sync.address import is_loopback, on_other_machines
from dapo_mcore.rollout.sglang.sync.parts import OtherLeaders, Outgoing, Root
from dapo_mcore.rollout.sglang.sync.process_group import RootRank, in_daemon
from dapo_mcore.rollout.sglang.sync.sender import Buckets

_CLOSE_S = 5.0
_LOOK_S = 1.0
_CONNECT_S = 1.0
_NUM_BROKEN_TOGETHER = 2
"""After as many broken updates in a row, each server gets a group of its own: the last repeat (handover.NUM_REPEATS)."""


def check_sync_host(host: str, urls: Sequence[str]) -> None:
    """Raise ConfigError if servers at `urls` would look for the trainer on their own machines, in vain for sync_timeout_s."""
    if is_loopback(host) and (strangers := on_other_machines(urls)):
        raise ConfigError(
            f"rollout.sglang.sync distributed gives servers the address sync_host {host}, by which only this machine "
            f"reaches the trainer, but {len(strangers)} of {len(urls)} servers are on others: {', '.join(strangers)}; set "
            "sync_host to the trainer's address in the cluster"
        )


class DistributedSender:
    """Sends one broadcast of each bucket to each group of servers, from the leader that has gathered it.

    Weights are not kept, so a server that was out gets weights at the next update. Gathering a bucket overlaps with sending
    the one before it: two buckets are in memory. A group lasts as long as its servers stay the same and well.

    servers_per_group   the most servers that receive one broadcast; None for all. A server that dies or refuses breaks the
                        broadcast for its whole group. If no server is left then, the update is broken, and all ranks repeat
                        it. After two broken updates in a row each server gets a group of its own.
    others              the leaders besides this process; None if it sends everything.
    """

    stage_metric, update_metric = None, "sync/broadcast_s"
    numbers: ClassVar[dict[str, float]] = {}
    reload = None
    empty = staticmethod(torch.empty)

    def __init__(
        self, host: str, backend: Literal["nccl", "gloo"], timeout_s: float, servers_per_group: int | None = None
    ):
        self._host, self._backend, self._timeout = host, backend, timedelta(seconds=timeout_s)
        self._servers_per_group = servers_per_group
        self.others: OtherLeaders | None = None
        self._groups: list[BroadcastGroup] = []
        self._dropped: list[BroadcastGroup] = []
        self._joining = asyncio.Lock()

    def stage(self, buckets: Iterator[tuple[Bucket, bool]], weight_version: str) -> Iterator[tuple[Bucket, bool]]:
        return buckets

    def pack(self, bucket: Bucket) -> Outgoing:
        return Outgoing(bucket)

    async def send(self, update: Transaction, buckets: Buckets[Outgoing]) -> None:
        """Regroup the servers if needed, then broadcast each bucket to all groups at once."""
        await self._regroup(update)
        await update.together("begin", {group.servers: group.begin() for group in self._whole_groups()})
        async for outgoing, final_version in buckets:
            works = {group.servers: group.send(outgoing, final_version) for group in self._whole_groups()}
            await update.together("receive", works)
            if not update.servers:
                break
        await update.each("end", lambda s: s.client.end_weight_update())

    def finish(self, weight_version: str | None) -> None: ...

    def close(self) -> None:
        """End all groups, and wait a few seconds for that: C++ aborts a process that exits in the middle of it."""
        groups, self._groups = self._groups, []
        end = time.monotonic() + _CLOSE_S
        for thread in [thread for group in groups for thread in group.close()]:
            thread.join(max(end - time.monotonic(), 0.0))

    def _whole_groups(self) -> list[BroadcastGroup]:
        return [group for group in self._groups if group.is_whole]

    async def _regroup(self, update: Transaction) -> None:
        """Make groups of exactly the servers in the update. Groups that still fit are kept."""
        wanted = self._partition(update)
        kept = [group for group in self._whole_groups() if group.servers in wanted]
        for group in self._groups:
            if group not in kept:
                group.close()
                self._dropped.append(group)
        self._groups = kept
        await update.each("leave", self._leave)
        self._dropped = [group for group in self._dropped if group.still_in]
        existing = {group.servers for group in kept}
        new = [servers for servers in self._partition(update) if servers not in existing]
        await update.together("join", {servers: self._join(servers) for servers in new})

    def _partition(self, update: Transaction) -> list[tuple[Server, ...]]:
        """Return the servers of each group. They are cut by their place in the pool, so that the absence of one server
        changes its own group only."""
        everybody = update.pool
        size = 1 if update.num_broken >= _NUM_BROKEN_TOGETHER else self._servers_per_group or len(everybody)
        parts = [everybody[start : start + size] for start in range(0, len(everybody), size)]
        present = [tuple(server for server in part if server in update.servers) for part in parts]
        return [part for part in present if part]

    async def _leave(self, server: Server) -> None:
        for group in self._dropped:
            if server in group.still_in:
                await group.leave(server)

    async def _join(self, servers: tuple[Server, ...]) -> None:
        async with self._joining:  # torch registers groups in tables without a lock; and all servers join in one order
            others = [] if self.others is None else self.others.roots
            group = BroadcastGroup(servers, [self._root, *others])
            self._groups.append(group)
            await group.join()

    def _root(self, name: str, world_size: int) -> RootRank:
        return RootRank(name, self._host, world_size, self._backend, self._timeout)


class BroadcastGroup:
    """Servers that receive broadcasts together. For each leader they are in a process group, of which it is rank 0, and the
    servers' ranks follow in order.

    A broadcast cannot leave a rank out, so the group fails as one. A server that is taken out loses its `broadcast_group`.

    leaders   for each leader, this process first, what makes its root from a name and the number of ranks.
    still_in  servers that may still have the group, which costs them memory, until they have left it.
    """

    def __init__(self, servers: tuple[Server, ...], leaders: Sequence[Callable[[str, int], Root]]):
        self.servers, self.still_in = servers, set(servers)
        self._leaders = leaders
        self._roots: list[Root] = []

    @property
    def is_whole(self) -> bool:
        return all(server.broadcast_group is self for server in self.servers)

    async def join(self) -> None:
        """Connect all servers with each leader in turn."""
        world_size = 1 + sum(server.num_ranks for server in self.servers)
        for leader in self._leaders:
            (root,) = await self._all(in_daemon(leader, f"weights-{secrets.token_hex(4)}", world_size))
            self._roots.append(root)
            calls, offset = [], 1
            for server in self.servers:
                place = (root.name, root.host, root.port, offset, world_size, root.backend)
                calls.append(server.client.init_weights_update_group(*place))
                offset += server.num_ranks
            await self._all(in_daemon(root.open), *calls, delay_s=_CONNECT_S)
        for server in self.servers:
            server.broadcast_group = self

    async def begin(self) -> None:
        """Open an update at every server."""
        await self._all(*(server.client.begin_weight_update() for server in self.servers))

    async def send(self, outgoing: Outgoing, final_version: str | None) -> None:
        """Broadcast one bucket from its leader. The last one brings the weight_version."""
        root, bucket = self._roots[outgoing.leader], outgoing.bucket
        calls = [s.client.update_weights_from_distributed(bucket, root.name, final_version) for s in self.servers]
        await self._all(in_daemon(root.broadcast, bucket), *calls)

    async def leave(self, server: Server) -> None:
        """Remove the group from the server. A server that was restarted does not have it any more and refuses."""
        for root in self._roots:
            with suppress(RequestRefused):
                await server.client.destroy_weights_update_group(root.name)
        self.still_in.discard(server)

    def close(self) -> list[threading.Thread]:
        """End our side in threads, since NCCL may take its time. This ends every wait of the servers, too."""
        return [root.close_soon() for root in self._roots]

    async def _all(self, *works: Awaitable[Any], delay_s: float = 0.0) -> list[Any]:
        """Return the results of all. Raise RequestFailed if one fails or a server's process ends, and give the group up: the other ranks may
        wait for the lost one for ever. `delay_s`  time for the others to get to that wait before the group is closed."""
        tasks = [asyncio.ensure_future(work) for work in works]
        everything, death = asyncio.create_task(_gather(tasks)), asyncio.create_task(self._watch_processes())
        for task in (everything, death):
            task.add_done_callback(_retrieve_error)  # nobody asks one that fails while it is cancelled
        try:
            done, _ = await asyncio.wait({everything, death}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            return everything.result()
        except (RolloutError, RuntimeError) as error:  # torch raises RuntimeError for a rank that is gone or silent
            try:
                await asyncio.sleep(delay_s)
            finally:  # the step's time may be up meanwhile
                self.close()
            urls = ", ".join(server.url for server in self.servers)
            raise RequestFailed(f"the broadcast to {urls} broke off: {error}") from error
        except BaseException:
            self.close()
            raise
        finally:
            for task in (everything, *tasks, death):
                task.cancel()

    async def _watch_processes(self) -> None:
        """Raise RequestFailed if a server's process ends. Its connections may not show it, if a whole node is gone."""
        while True:
            await asyncio.sleep(_LOOK_S)
            for server in self.servers:
                if not await server.is_alive():
                    raise RequestFailed(f"{server.url} has ended")


async def _gather(tasks: list[asyncio.Future[Any]]) -> list[Any]:
    return await asyncio.gather(*tasks)


def _retrieve_error(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()
