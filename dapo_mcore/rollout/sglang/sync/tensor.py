"""Weights to servers on this machine by shared memory, which they open and copy from.

Change here: when shared memory is given back, and what a server is asked to do with it. How memory is shared is in
shared_bucket.py.

Servers get pickles. They go only to servers that the user has named or this run has started, over loopback or an address of
this machine, with the admin key. Nothing that a server sends is unpickled here.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from weakref import WeakSet

import torch
from torch import Tensor

from dapo_mcore.architecture.manifest import Bucket
from dapo_mcore.errors import ConfigError, RolloutError
from dapo_mcore.rollout.sglang.client.http import RequestFailed
from dapo_mcore.rollout.sglang.pool.server import Server
from dapo_mcore.rollout.sglang.pool.update import Transaction
from dapo_mcore.rollout.sglang.sync.address import on_other_machines
from dapo_mcore.rollout.sglang.sync.sender import Buckets
from dapo_mcore.rollout.sglang.sync.shared_bucket import SharedBucket, shareable_bytes


class TensorSender:
    """Shares each bucket's memory with the servers. Each server copies the part that it serves.

    urls          of servers that the run has not started. Raise ConfigError if one is not on this machine.
    bucket_bytes  size limit of a bucket. A larger tensor is alone in one.

    Weights are not kept, so a server that was out gets weights at the next update. A bucket is copied into shared memory,
    and the servers read it while the next one is gathered. So one bucket is shared while another is gathered; if a server
    has several ranks, a second one is shared. A tensor larger than a bucket is gathered in shared memory at once, see `empty`.
    """

    stage_metric, update_metric = None, "sync/tensor_s"
    reload = None

    def __init__(self, urls: Sequence[str], bucket_bytes: int):
        self._shared: deque[SharedBucket] = deque()
        self._own: WeakSet[torch.UntypedStorage] = WeakSet()
        self.bucket_bytes = bucket_bytes
        self._num_read = 0
        if strangers := on_other_machines(urls):
            raise ConfigError(
                f"rollout.sglang.sync tensor hands over memory of this machine, but {len(strangers)} of {len(urls)} "
                f"servers are not at an address of it: {', '.join(strangers)}; name servers on rank 0's machine in "
                "rollout.sglang.urls, or sync distributed"
            )

    def empty(self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory like torch.empty; shareable memory if the tensor will be alone in its bucket."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes > self.bucket_bytes:
            # Other ranks take part in a gather, so it cannot stop here. `pack` raises if there is still no room then.
            with suppress(RolloutError, OSError, RuntimeError):
                data = shareable_bytes(num_bytes, device)
                self._own.add(data.untyped_storage())
                return data.view(dtype).view(*shape)
        return torch.empty(shape, dtype=dtype, device=device)

    def stage(self, buckets: Iterator[tuple[Bucket, bool]], weight_version: str) -> Iterator[tuple[Bucket, bool]]:
        return buckets

    def pack(self, bucket: Bucket) -> SharedBucket:
        """Share the bucket, once every server has answered for the one before, which is the last of `_shared`.

        Some of the buckets that servers have answered for may still be read: `_num_read`, which is 1 if a server has several
        ranks. SGLang answers from its first rank, which has waited only for its own copies. From 0.5.21 on, the other ranks
        may pass the barrier before the answer while copies are still queued on their GPUs. They wait for the copies when they
        let go of the memory, before they take the next request, and its answer needs all ranks. The request after the last
        bucket is the end of the session. Up to 0.5.20 they let go before the barrier.
        """
        used = self._shared.popleft() if len(self._shared) > self._num_read else None
        self._shared.append(SharedBucket(bucket, used, self._own))
        return self._shared[-1]

    async def send(self, update: Transaction, buckets: Buckets[SharedBucket]) -> None:
        """Make every server copy each bucket."""
        self._num_read = 1 if any(server.num_ranks > 1 for server in update.pool) else 0
        await update.each("begin", lambda s: s.client.begin_weight_update())
        copy = _copy_first
        async for shared, final_version in buckets:
            await update.each("open", lambda s: copy(s, shared, final_version))  # noqa: B023
            copy = _copy
        await update.each("end", lambda s: s.client.end_weight_update())

    def finish(self, weight_version: str | None) -> None:
        self.close()

    def close(self) -> None:
        """Give all shared memory back."""
        while self._shared:
            self._shared.popleft().close()


async def _copy(server: Server, shared: SharedBucket, final_version: str | None) -> None:
    handles = [shared.handle() for _ in range(server.num_ranks)]
    await server.client.update_weights_from_tensor(handles, final_version)


async def _copy_first(server: Server, shared: SharedBucket, final_version: str | None) -> None:
    try:
        await _copy(server, shared, final_version)
    except RequestFailed as error:
        raise RequestFailed(
            f"{error}; SGLang ends where it cannot open the trainer's memory: rollout.sglang.sync tensor needs servers "
            "of the same user on the same machine, which see rank 0's GPU (CUDA_VISIBLE_DEVICES), or on CPUs its "
            "/dev/shm and temporary folder; for others sync distributed"
        ) from error
