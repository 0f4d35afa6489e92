"""What every way of sending weights has in common: the contract of a sender, and how gathering overlaps with sending.

Change here: the contract, or the overlap. How a bucket travels is in disk.py, distributed.py and tensor.py. The engine opens
an update at the pool (pool/update.py) and hands it to a sender. A sender gives the buckets to the servers of that update. It
never calls the pool.

    engine ── pool.update ──→ transaction           pause … confirm … continue, on all servers
       └───── sender.send(transaction, buckets) ──→ transaction.each(step, call to one server)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from dapo_mcore.architecture.manifest import Bucket
from dapo_mcore.errors import RolloutError
from dapo_mcore.process.loop_thread import LoopThread
from dapo_mcore.rollout.sglang.pool.recovery import Reload
from dapo_mcore.rollout.sglang.pool.update import Transaction

T = TypeVar("T")
Buckets = AsyncIterator[tuple[T, str | None]]
"""What `pack` made of each bucket, and its weight_version: None before the last bucket."""


class Sender(Protocol[T]):
    """One way of sending weights to the servers of an update.

    stage_metric   name of the time that `stage` takes, in seconds; None if it does nothing.
    update_metric  name of the time from there to the end of the update, in seconds.
    reload         gives one server the weights of a weight_version again; None if they are not kept.
    numbers        more metrics of the last update.
    """

    stage_metric: str | None
    update_metric: str
    reload: Reload | None
    numbers: Mapping[str, float]

    def empty(self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory for a tensor of the next stream, like types.ReceivingEngine.empty."""
        ...

    def stage(self, buckets: Iterator[tuple[Bucket, bool]], weight_version: str) -> Iterator[tuple[T, bool]]:
        """Return what to send, with True for the last item. Runs before the servers are paused, in the caller's thread.

        The items may be made as they are asked for. So gathering the next one overlaps with sending the one before it.
        """
        ...

    def pack(self, item: T) -> Any:
        """Return the item as `send` takes it. Runs in the caller's thread, once `send` has asked for it."""
        ...

    async def send(self, update: Transaction, buckets: Buckets[Any]) -> None:
        """Give the buckets to the servers of the update. To ask for the next one says that the one before it is sent."""
        ...

    def finish(self, weight_version: str | None) -> None:
        """Give back what the update has used. `weight_version` names the weights that are served now; None after an error."""
        ...

    def close(self) -> None: ...


class BucketQueue:
    """Hands the buckets of one stream from the thread that gathers them to the event loop that sends them, one at a time."""

    def __init__(self, weight_version: str, loop: LoopThread):
        self._weight_version, self._loop = weight_version, loop
        self._ready: asyncio.Queue[tuple[Any, bool] | Exception] = asyncio.Queue(maxsize=1)
        self._wanted = asyncio.Event()

    def feed(self, items: Iterator[tuple[T, bool]], pack: Callable[[T], Any], update: Future[None]) -> None:
        """Put every item in the queue, and wait until `update`, which takes them out, is done.

        All items are taken from the iterator even if the update ends early: other ranks send what is in it. Raise what the
        update raises. An error of the iterator or of `pack` breaks the update off and is raised itself.
        """
        try:
            for item, last in items:
                if self._wait_until_wanted(update):
                    self._loop.run(self._put((pack(item), last)))
        except BaseException as error:
            if self._wait_until_wanted(update):
                self._loop.run(self._put(RolloutError(f"the weight stream broke off: {error!r}")))
            wait([update])
            raise
        update.result()

    async def buckets(self) -> Buckets[Any]:
        """Yield the packed buckets. Raise RolloutError if the stream breaks off."""
        last = False
        while not last:
            self._wanted.set()
            item = await self._ready.get()
            if isinstance(item, Exception):
                raise item
            packed, last = item
            yield packed, self._weight_version if last else None

    async def _put(self, item: tuple[Any, bool] | Exception) -> None:
        self._wanted.clear()
        await self._ready.put(item)

    def _wait_until_wanted(self, update: Future[None]) -> bool:
        """Wait until the next bucket is asked for. Return False if the update has ended and takes no more."""
        wanted = self._loop.submit(self._wanted.wait())
        wait([wanted, update], return_when=FIRST_COMPLETED)
        wanted.cancel()
        return not update.done()


class Sent(NamedTuple):
    """What a stream has cost: the sender's own `numbers`, the bytes of its tensors, and the seconds in all."""

    numbers: dict[str, float]
    num_bytes: int
    seconds: float

    def metrics(self, others_bytes: int) -> dict[str, float]:
        """Return the sync's metrics. `others_bytes` have come from other leaders."""
        num_bytes = self.num_bytes + others_bytes
        return {**self.numbers, "sync/bytes": float(num_bytes), "sync/gb_per_s": num_bytes / 1e9 / self.seconds}


def send_stream(
    stream: Iterator[tuple[Bucket, bool]],
    sender: Sender[Any],
    weight_version: str,
    loop: LoopThread,
    update: Callable[[Buckets[Any]], Coroutine[Any, Any, None]],
) -> Sent:
    """Gather the stream here while `update`, in the loop, gives its packed buckets to servers. Raise what either raises."""
    num_bytes = 0

    def counted() -> Iterator[tuple[Bucket, bool]]:
        nonlocal num_bytes
        for bucket, last in stream:
            num_bytes += sum(tensor.nbytes for _, tensor in bucket)
            yield bucket, last

    served, start = None, time.perf_counter()
    try:
        staged = sender.stage(counted(), weight_version)
        staged_at = time.perf_counter()
        queue = BucketQueue(weight_version, loop)
        queue.feed(staged, sender.pack, loop.submit(update(queue.buckets())))
        served = weight_version
    finally:
        sender.finish(served)
    end = time.perf_counter()
    numbers = {**sender.numbers, sender.update_metric: end - staged_at}
    if sender.stage_metric is not None:
        numbers[sender.stage_metric] = staged_at - start
    return Sent(numbers, num_bytes, end - start)
