"""Weights to servers by shared memory of their machine, which they open and copy from.

Change here: when shared memory is given back, and what a server is asked to do with it. How memory is shared is in
shared_bucket.py, and how buckets get to other machines in relay.py.

Servers get pickles. They go only to servers that the user has named or this run has started, over loopback, an address of
this machine or of a node of the job, with the admin key. Nothing that a server sends is unpickled here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import ClassVar
from weakref import WeakSet

import torch
from torch import Tensor

from dapo_mcore.architecture.manifest import Bucket
from dapo_mcore.errors import ConfigError, RolloutError
from dapo_mcore.rollout.sglang.client.http import RequestFailed
from dapo_mcore.rollout.sglang.launch.node_servers import NodeServer
from dapo_mcore.rollout.sglang.pool.server import Server
from dapo_mcore.rollout.sglang.pool.update import Transaction
from dapo_mcore.rollout.sglang.sync.address import on_other_machines
from dapo_mcore.rollout.sglang.sync.relay import Relays
from dapo_mcore.rollout.sglang.sync.sender import Buckets
from dapo_mcore.rollout.sglang.sync.shared_bucket import ReadBuckets, SharedBucket, shareable_bytes

Handles = Mapping[int, str]
"""The handle of one bucket on each node, by the rank that shares it there."""


class TensorSender:
    """Shares each bucket's memory with the servers. Each server copies the part that it serves.

    urls          of servers that the run has not started. Raise ConfigError if one is not on this machine.
    bucket_bytes  size limit of a bucket. A larger tensor is alone in one.
    relays        share each bucket on the other nodes of the job too; None if all servers are on this machine.

    Weights are not kept, so a server that was out gets weights at the next update. A bucket is copied into shared memory,
    and the servers read it while the next one is gathered. So one bucket is shared while another is gathered; if a server
    has several ranks, a second one is shared. A tensor larger than a bucket is gathered in shared memory at once, see `empty`.
    """

    stage_metric, update_metric = None, "sync/tensor_s"
    numbers: ClassVar[dict[str, float]] = {}
    reload = None

    def __init__(self, urls: Sequence[str], bucket_bytes: int, relays: Relays | None = None):
        self._shared, self._relays = ReadBuckets(), relays
        self._own: WeakSet[torch.UntypedStorage] = WeakSet()
        self.bucket_bytes = bucket_bytes
        self._num_read, self._num_openers = 0, 1
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

    def pack(self, bucket: Bucket) -> Handles:
        """Share the bucket on every node, once every server has answered for the one before, which is the last of `_shared`.

        Some of the buckets that servers have answered for may still be read: `_num_read`, which is 1 if a server has several
        ranks. SGLang answers from its first rank, which has waited only for its own copies. From 0.5.21 on, the other ranks
        may pass the barrier before the answer while copies are still queued on their GPUs. They wait for the copies when they
        let go of the memory, before they take the next request, and its answer needs all ranks. The request after the last
        bucket is the end of the session. Up to 0.5.20 they let go before the barrier.
        """
        new = partial(SharedBucket.copy_of, bucket, own=self._own)
        shared = self._shared.add(new, self._num_read)
        elsewhere = self._relays.share(shared, self._num_read, self._num_openers) if self._relays is not None else {}
        return {0: shared.handle(self._num_openers), **elsewhere}

    async def send(self, update: Transaction, buckets: Buckets[Handles]) -> None:
        """Make every server copy each bucket."""
        self._num_read = 1 if any(server.num_ranks > 1 for server in update.pool) else 0
        self._num_openers = _most_ranks_on_a_node(update.pool)
        await update.each("begin", lambda s: s.client.begin_weight_update())
        copy = _copy_first
        async for handles, final_version in buckets:
            await update.each("open", lambda s: copy(s, handles, final_version))  # noqa: B023
            copy = _copy
        await update.each("end", lambda s: s.client.end_weight_update())

    def finish(self, weight_version: str | None) -> None:
        self.close()

    def close(self) -> None:
        """Give all shared memory of this machine back."""
        self._shared.close()


def _sharing_rank(server: Server) -> int:
    """Return the rank that shares memory with the server: the parent of its process if that is on a node of the job."""
    return server.process.node.rank if isinstance(server.process, NodeServer) else 0


def _most_ranks_on_a_node(servers: Sequence[Server]) -> int:
    counts: Counter[int] = Counter()
    for server in servers:
        counts[_sharing_rank(server)] += server.num_ranks
    return max(counts.values(), default=1)


async def _copy(server: Server, handles: Handles, final_version: str | None) -> None:
    own = [handles[_sharing_rank(server)]] * server.num_ranks
    await server.client.update_weights_from_tensor(own, final_version)


async def _copy_first(server: Server, handles: Handles, final_version: str | None) -> None:
    try:
        await _copy(server, handles, final_version)
    except RequestFailed as error:
        raise RequestFailed(
            f"{error}; SGLang ends where it cannot open the trainer's memory: rollout.sglang.sync tensor needs servers "
            "of the same user on the same machine, which see the GPU of rank 0 or of their node's first rank "
            "(CUDA_VISIBLE_DEVICES), or on CPUs its /dev/shm and temporary folder; for others sync distributed"
        ) from error
