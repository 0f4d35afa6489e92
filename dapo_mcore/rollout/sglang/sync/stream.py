"""The weight stream to servers bucket by bucket: one is sent while the next is gathered, and nothing is kept.

Change here: how gathering and sending overlap. How one bucket is sent is distributed.py and tensor.py; Fleet.update makes
it a transaction.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, TypeVar

from dapo_mcore.architecture.manifest import Bucket
from dapo_mcore.errors import RolloutError
from dapo_mcore.rollout.sglang.client.http import RequestRefused
from dapo_mcore.rollout.sglang.client.loop_thread import LoopThread
from dapo_mcore.rollout.sglang.pool.pool import Fleet
from dapo_mcore.rollout.sglang.pool.server import Member
from dapo_mcore.rollout.sglang.pool.transaction import Transaction

T = TypeVar("T")
Parcels = AsyncIterator[tuple[T, str | None]]
"""What `pack` made of each bucket, and the version that it brings: the tag with the last one, None before."""


def send_stream(
    buckets: Iterator[tuple[Bucket, bool]],
    tag: str,
    fleet: Fleet,
    loop: LoopThread,
    steps: Callable[[Transaction, Parcels[T]], Awaitable[None]],
    pack: Callable[[Bucket], T] = lambda bucket: bucket,
) -> float:
    """Bytes of the stream, once `steps` has given them to every serving server in one Fleet.update.

    steps  runs in the loop; asking for the next parcel says that the one before is sent.
    pack   runs in this thread, on each bucket once the one before it is sent.
    Raises RolloutError as Fleet.update does; an error of the stream breaks the update off and is raised itself.
    """
    ready: asyncio.Queue[tuple[T, bool] | Exception] = asyncio.Queue(maxsize=1)
    update = loop.submit(fleet.update(tag, lambda transaction: steps(transaction, _parcels(ready, tag))))
    num_bytes = 0
    try:
        for bucket, last in buckets:
            num_bytes += sum(tensor.nbytes for _, tensor in bucket)
            if _wait_until_sent(ready, update, loop):
                loop.run(ready.put((pack(bucket), last)))
    except BaseException as error:
        if _wait_until_sent(ready, update, loop):
            loop.run(ready.put(RolloutError(f"the weight stream broke off: {error!r}")))
        wait([update])
        raise
    update.result()
    return float(num_bytes)


async def open_session(member: Member) -> None:
    """A weight update's session, where the version has them."""
    try:
        await member.api.begin_update()
    except RequestRefused:  # left open by an update that was broken off
        await member.api.end_update()
        await member.api.begin_update()


async def _parcels(ready: asyncio.Queue, tag: str) -> Parcels[Any]:
    last = False
    while not last:
        item = await ready.get()
        if isinstance(item, Exception):
            raise item
        parcel, last = item
        yield parcel, tag if last else None
        ready.task_done()


def _wait_until_sent(ready: asyncio.Queue, update: Future, loop: LoopThread) -> bool:
    """Waits for the bucket before; False when nobody will take another one."""
    sent = loop.submit(ready.join())
    wait([sent, update], return_when=FIRST_COMPLETED)
    sent.cancel()
    return not update.done()
