"""Servers that receive one broadcast together.

Change here: how the servers of a group join, receive and break off together. Which servers are in one is distributed.py.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Awaitable
from contextlib import suppress
from datetime import timedelta
from typing import Any

from dapo_mcore.architecture.manifest import Bucket
from dapo_mcore.errors import RolloutError
from dapo_mcore.rollout.sglang.client.http import RequestFailed, RequestRefused
from dapo_mcore.rollout.sglang.pool.server import Member
from dapo_mcore.rollout.sglang.sync.process_group import RootRank, in_daemon
from dapo_mcore.rollout.sglang.sync.stream import open_session

_LOOK_S = 1.0
_CONNECT_S = 1.0


class ServerGroup:
    """This process is rank 0, the servers' ranks follow in order. It fails as one: a broadcast cannot leave a rank out.

    members   what a member's `link` is while it is in the group; the fleet cuts the link of one that it takes out.
    remain    members whose server may still hold its end, which costs memory there, until they have left.
    """

    def __init__(self, members: tuple[Member, ...], host: str, backend: str, timeout: timedelta):
        self.members, self.remain = members, set(members)
        self._host = host
        world_size = 1 + sum(member.num_ranks for member in members)
        self._root = RootRank(f"weights-{secrets.token_hex(4)}", host, world_size, backend, timeout)

    @property
    def is_whole(self) -> bool:
        return all(member.link is self for member in self.members)

    async def join(self) -> None:
        """Connects everybody."""
        root, calls, offset = self._root, [], 1
        for member in self.members:
            calls.append(member.api.join_group(root.name, self._host, root.port, offset, root.world_size, root.backend))
            offset += member.num_ranks
        await self._all(in_daemon(root.open), *calls, patience_s=_CONNECT_S)
        for member in self.members:
            member.link = self

    async def begin(self) -> None:
        """Opens an update at every member; one that was broken off there is closed before."""
        await self._all(*(open_session(member) for member in self.members))

    async def send(self, bucket: Bucket, final_version: str | None) -> None:
        """One broadcast of the bucket; the last one brings the version."""
        name = self._root.name
        calls = [member.api.receive(bucket, name, final_version) for member in self.members]
        await self._all(in_daemon(self._root.broadcast, bucket), *calls)

    async def leave(self, member: Member) -> None:
        """Takes the group off the member's server; one that was restarted has it no more."""
        with suppress(RequestRefused):
            await member.api.leave_group(self._root.name)
        self.remain.discard(member)

    def close(self) -> threading.Thread:
        """Ends our side, and so every wait of the others, in a thread: NCCL may take its time."""
        return self._root.close_soon()

    async def _all(self, *works: Awaitable[Any], patience_s: float = 0.0) -> None:
        """Awaits all; RequestFailed when one fails or a member's process has ended. The group is then given up, since
        the rest may wait for the lost one for ever; `patience_s` later, where they must get to that wait first."""
        tasks = [asyncio.ensure_future(work) for work in works]
        everything, death = asyncio.create_task(_each_of(tasks)), asyncio.create_task(self._death())
        for task in (everything, death):
            task.add_done_callback(_heard)  # one that fails as it is cancelled is asked by nobody
        try:
            done, _ = await asyncio.wait({everything, death}, return_when=asyncio.FIRST_COMPLETED)
            for outcome in done:
                outcome.result()
        except (RolloutError, RuntimeError) as error:  # RuntimeError is torch's word for a rank that is gone or silent
            try:
                await asyncio.sleep(patience_s)
            finally:  # the step's time may be up meanwhile
                self.close()
            urls = ", ".join(member.api.url for member in self.members)
            raise RequestFailed(f"the broadcast to {urls} broke off: {error}") from error
        except BaseException:
            self.close()
            raise
        finally:
            for task in (everything, *tasks, death):
                task.cancel()

    async def _death(self) -> None:
        """Raises when a member's process has ended: its connections may not tell, where a whole node is gone."""
        while True:
            await asyncio.sleep(_LOOK_S)
            for member in self.members:
                if not await member.is_alive():
                    raise RequestFailed(f"{member.api.url} has ended")


async def _each_of(tasks: list[asyncio.Future[Any]]) -> None:
    await asyncio.gather(*tasks)


def _heard(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()
