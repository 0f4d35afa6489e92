"""The weight stream to servers on this machine by memory that they open and copy.

Change here: when shared memory is given back, and what is asked of a server that takes it. How memory is shared is
shared_bucket.py; Fleet.update makes it a transaction.

What a server gets is a pickle, sent to servers that the user has named or this run has started, over loopback or an
address of this machine, with the admin key. Nothing that a server sends is unpickled here.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from weakref import WeakSet

import torch
from torch import Tensor

from dapo_mcore.architecture.manifest import Bucket
from dapo_mcore.errors import ConfigError, RolloutError
from dapo_mcore.rollout.sglang.client.address import elsewhere
from dapo_mcore.rollout.sglang.client.http import RequestFailed
from dapo_mcore.rollout.sglang.client.loop_thread import LoopThread
from dapo_mcore.rollout.sglang.pool.pool import Fleet
from dapo_mcore.rollout.sglang.pool.server import Member
from dapo_mcore.rollout.sglang.pool.transaction import Transaction
from dapo_mcore.rollout.sglang.sync.shared_bucket import SharedBucket, shareable_bytes
from dapo_mcore.rollout.sglang.sync.stream import Parcels, open_session, send_stream


class TensorTransfer:
    """Weights by handles of memory of this process, from which each server copies the part that it serves.

    urls          of servers that somebody else started; ConfigError where one is not on this machine.
    bucket_bytes  the most in a bucket; a larger tensor is alone in one.

    Nothing is kept, so a server that was out gets weights at the next update. A bucket is copied into shared memory, and
    gathering the next one overlaps with the servers' reading. So one is shared and one being gathered; where a server has
    several ranks, a second one is shared. A tensor larger than a bucket is gathered where it is shared, see `empty`.
    """

    resync = None

    def __init__(self, urls: Sequence[str], bucket_bytes: int):
        self._shared: deque[SharedBucket] = deque()
        self._own: WeakSet[torch.UntypedStorage] = WeakSet()
        self._bucket_bytes = bucket_bytes
        if strangers := elsewhere(urls):
            raise ConfigError(
                f"rollout.sglang.sync tensor hands over memory of this machine, but {len(strangers)} of {len(urls)} "
                f"servers are not at an address of it: {', '.join(strangers)}; name servers on rank 0's machine in "
                "rollout.sglang.urls, or sync distributed"
            )

    def empty(self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """As torch.empty; in memory that servers can open, where the tensor will be alone in its bucket."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes > self._bucket_bytes:
            # a gather cannot stop here, others are in it; `_share` says it, if there is no room then either
            with suppress(RolloutError, OSError, RuntimeError):
                data = shareable_bytes(num_bytes, device)
                self._own.add(data.untyped_storage())
                return data.view(dtype).view(*shape)
        return torch.empty(shape, dtype=dtype, device=device)

    def send(
        self, buckets: Iterator[tuple[Bucket, bool]], tag: str, fleet: Fleet, loop: LoopThread
    ) -> dict[str, float]:
        """Metrics of the update that gave every serving server the stream's weights."""
        start = time.perf_counter()
        many_ranks = any(member.num_ranks > 1 for member in fleet.members)
        try:
            share = partial(self._share, num_read=1 if many_ranks else 0)
            num_bytes = send_stream(buckets, tag, fleet, loop, self._hand_over, share)
        finally:
            self.close()
        return {"sync/tensor_s": time.perf_counter() - start, "sync/bytes": num_bytes}

    def close(self) -> None:
        while self._shared:
            self._shared.popleft().close()

    def _share(self, bucket: Bucket, num_read: int) -> SharedBucket:
        """Called once every server has answered for the bucket before this one, the last of `_shared`.

        num_read  how many of those answered for may still be read: 1 where a server has several ranks. SGLang answers
                  from its first rank, which has waited for its own copies. From 0.5.21 on, the others may pass the
                  barrier before the answer with copies still queued on their GPUs. They wait for them as they let go of
                  the memory, before they take the next request, whose answer needs them all. The request after the last
                  bucket is the end of the session. Up to 0.5.20 they let go before the barrier.
        """
        used = self._shared.popleft() if len(self._shared) > num_read else None
        self._shared.append(SharedBucket(bucket, used, self._own))
        return self._shared[-1]

    async def _hand_over(self, transaction: Transaction, parcels: Parcels[SharedBucket]) -> None:
        await transaction.each("begin", open_session)
        open_ = _open_first
        async for shared, version in parcels:
            await transaction.each("open", partial(open_, shared, version))
            open_ = _open
        await transaction.each("end", lambda m: m.api.end_update())


async def _open(shared: SharedBucket, version: str | None, member: Member) -> None:
    await member.api.open_tensors([shared.handle() for _ in range(member.num_ranks)], version)


async def _open_first(shared: SharedBucket, version: str | None, member: Member) -> None:
    try:
        await _open(shared, version, member)
    except RequestFailed as error:
        raise RequestFailed(
            f"{error}; SGLang ends where it cannot open the trainer's memory: rollout.sglang.sync tensor needs servers "
            "of the same user on the same machine, which see rank 0's GPU (CUDA_VISIBLE_DEVICES), or on CPUs its "
            "/dev/shm and temporary folder; for others sync distributed"
        ) from error
