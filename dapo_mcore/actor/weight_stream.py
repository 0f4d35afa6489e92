"""The stream of HF-named weights out of a sharded actor: export writes it to files, rollout engines load it.

Change here: how shards travel to the rank that uses them, which is rank 0 or one of several leaders. Parameters are grouped
into buckets, and each rank sends its shards of a bucket to the bucket's leader in one message. While the tensors of one bucket
are used, the messages of the next are already under way.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.distributed as dist

from dapo_mcore.actor.model.policy import Policy
from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.architecture.mapping import Parameter, export_parameter, find_parameter, local_shape
from dapo_mcore.architecture.shape import WeightShape
from dapo_mcore.types import Empty

BUCKET_BYTES = 32 << 20
"""Size of a bucket, all shards together: large enough to hide a message's fixed cost, small against the engines' buckets."""
_POLL_S = 0.0001
ONE_LEADER = (0,)


@dataclass(frozen=True)
class StreamedParameter:
    """A parameter of the stream.

    name         Megatron's name, with numbers of the whole model
    holders      ranks that send a shard, in shard order
    shard_shape  shape of each shard
    dtype        dtype of each shard
    """

    name: str
    parameter: Parameter
    holders: tuple[int, ...]
    shard_shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def shard_size(self) -> int:
        """Return the number of elements of one shard."""
        return math.prod(self.shard_shape)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all shards together."""
        return self.shard_size * self.dtype.itemsize * len(self.holders)

    @property
    def is_concatenated(self) -> bool:
        """Return True if its shards, concatenated along the rows, are the HF tensor plus any vocabulary padding."""
        return self.parameter.rule.tp_split == "rows" and self.parameter.rule.merge == "one"


Bucket = tuple[StreamedParameter, ...]
"""Parameters with the same holders and dtype. Each holder sends its shards of them in one message."""

Shards = list[list[torch.Tensor]]
"""For each parameter of a bucket, its shards in rank order."""


class WeightStream:
    """Calling it yields (HF name, full tensor) on the leaders, by default on rank 0, and nothing elsewhere. Every rank must
    drain it.

    With several leaders each yields another part of the model: the buckets whose first holder is at or after it in rank order,
    and before the next leader. All ranks name the same leaders; rank 0 is the first.

    A tensor is a parameter of the actor or has its own memory; it keeps its value until the actor's weights change.
    Extra memory on a leader, besides tensors that the caller keeps: two buckets (of BUCKET_BYTES or the largest parameter).
    `empty` allocates large vocabulary matrices that come from other ranks.
    Communication: one message per bucket from each of its holders to its leader. Construction all-gathers the names. A rank
    sends two messages at a time; on a GPU one, which the GPU has sent before the next is queued: a GPU may run what is queued on
    it in order, whatever the stream (CUDA_DEVICE_MAX_CONNECTIONS 1). A bucket that this rank receives as a peer of the sync
    (types.SyncPeer) must not wait there behind messages that a leader takes only later.
    """

    def __init__(self, policy: Policy, shape: WeightShape, layout: Layout, bucket_bytes: int = BUCKET_BYTES):
        self.shape = shape
        self.layout = layout
        local = dict(policy.named_weights())
        if shape.tied and not layout.is_first_stage:
            local.pop("output_layer.weight", None)
        self.dtype = policy.config.params_dtype
        self.local = {name: tensor for name, tensor in local.items() if self._sends(name)}
        self.plan = [bucket for group in self._groups() for bucket in _buckets(group, bucket_bytes)]

    def __call__(
        self, empty: Empty = torch.empty, leaders: Sequence[int] = ONE_LEADER
    ) -> Iterator[tuple[str, torch.Tensor]]:
        rank, num_ahead = self.layout.rank, 0 if self.layout.device.type == "cuda" else 1
        receiving: deque[tuple[Bucket, Shards, list[dist.Work]]] = deque()
        sending: deque[tuple[dist.Work, torch.Tensor]] = deque()
        for bucket in self.plan:
            self.layout.beacon.tick()
            holders = bucket[0].holders
            leader = max(leader for leader in leaders if leader <= holders[0])
            if leader == rank:
                receiving.append((bucket, *self._receive(bucket, empty)))
                if len(receiving) > 1:
                    yield from self._exported(*receiving.popleft())
            elif rank in holders:
                sending.append(self._send(bucket, leader))
                if len(sending) > num_ahead:
                    self._wait_until_sent(sending.popleft()[0])
        while receiving:
            yield from self._exported(*receiving.popleft())
        for work, _ in sending:
            work.wait()

    def _sends(self, name: str) -> bool:
        """Return True if this rank's shard is in the stream: the first data-parallel copy, and one copy of unsplit weights."""
        layout, rule = self.layout, find_parameter(name, self.shape).rule
        tensor_rank = layout.expert_tensor_rank if rule.per_expert else layout.tensor_rank
        first = layout.expert_data_rank == 0 if rule.per_expert else layout.data_rank == layout.context_rank == 0
        return first and (rule.tp_split is not None or tensor_rank == 0)

    def _groups(self) -> Iterator[list[StreamedParameter]]:
        """Yield all parameters, grouped by holders and dtype; pipeline stages come one after the other."""
        names_of_ranks = self.layout.share_objects(list(self.local))
        holders: dict[str, tuple[int, ...]] = {}
        for rank, names in enumerate(names_of_ranks):  # ranks ascend with the tensor-parallel rank
            for name in names:
                holders[name] = (*holders.get(name, ()), rank)
        streamed = [self._streamed(name, ranks) for name, ranks in holders.items()]
        # stable, so norms, which only one rank sends, do not break up the groups of matrices around them
        for _, group in groupby(sorted(streamed, key=_holders_and_dtype), key=_holders_and_dtype):
            yield list(group)

    def _streamed(self, name: str, holders: tuple[int, ...]) -> StreamedParameter:
        parameter = find_parameter(name, self.shape)
        dtype = torch.float32 if parameter.rule.float32 else self.dtype
        shard_shape = local_shape(parameter, self.shape, len(holders))
        return StreamedParameter(name, parameter, holders, shard_shape, dtype)

    def _send(self, bucket: Bucket, leader: int) -> tuple[dist.Work, torch.Tensor]:
        """Start to send this rank's shards of a bucket. Return the message too, which must live until the work is done."""
        message = _concatenated([self.local[streamed.name].detach() for streamed in bucket])
        return dist.isend(message, leader), message

    def _wait_until_sent(self, work: dist.Work) -> None:
        while self.layout.device.type == "cuda" and not work.is_completed():  # NCCL's wait only orders the stream
            time.sleep(_POLL_S)
        work.wait()

    def _receive(self, bucket: Bucket, empty: Empty) -> tuple[Shards, list[dist.Work]]:
        """Start to receive a bucket. Return its shards, which are valid once the returned works are done."""
        holders, size = bucket[0].holders, sum(streamed.shard_size for streamed in bucket)
        if len(bucket) == 1 and bucket[0].is_concatenated and holders != (self.layout.rank,):
            return self._receive_in_place(bucket[0], empty)
        shards, works = [[] for _ in bucket], []
        for holder in holders:
            if holder == self.layout.rank:
                parts = [self.local[streamed.name].detach() for streamed in bucket]
            else:
                message = torch.empty(size, dtype=bucket[0].dtype, device=self.layout.device)
                works.append(dist.irecv(message, holder))
                parts = message.split([streamed.shard_size for streamed in bucket])
            for own, part, streamed in zip(shards, parts, bucket, strict=True):
                own.append(part.view(streamed.shard_shape))
        return shards, works

    def _receive_in_place(self, streamed: StreamedParameter, empty: Empty) -> tuple[Shards, list[dist.Work]]:
        """Receive a large vocabulary matrix directly into the whole tensor, and return that as its only shard."""
        rows, *others = streamed.shard_shape
        whole = empty((rows * len(streamed.holders), *others), dtype=streamed.dtype, device=self.layout.device)
        works = []
        for holder, part in zip(streamed.holders, whole.split(rows), strict=True):
            if holder == self.layout.rank:
                part.copy_(self.local[streamed.name].detach())
            else:
                works.append(dist.irecv(part, holder))
        return [[whole]], works

    def _exported(self, bucket: Bucket, shards: Shards, works: list[dist.Work]) -> Iterator[tuple[str, torch.Tensor]]:
        """Wait for the bucket's messages and yield its tensors."""
        while works:  # popped, because a work keeps its message alive
            works.pop(0).wait()
        for streamed in bucket:
            yield from export_parameter(streamed.parameter, shards.pop(0), self.shape)


def leading_ranks(layout: Layout, most: int) -> tuple[int, ...]:
    """Return up to `most` ranks that can each lead a part of the model: the first rank of each pipeline stage, or of each run of
    stages where there are more.

    A leader never sends shards to another one, so none is held up while another waits for its turn.
    """
    count, stage_size = min(most, layout.pipeline), layout.world_size // layout.pipeline
    return tuple(i * layout.pipeline // count * stage_size for i in range(count))


def _holders_and_dtype(streamed: StreamedParameter) -> tuple[tuple[int, ...], str]:
    return streamed.holders, str(streamed.dtype)


def _buckets(group: list[StreamedParameter], limit: int) -> Iterator[Bucket]:
    """Yield the group in buckets of at most `limit` bytes; a larger parameter gets a bucket of its own."""
    bucket: Bucket = ()
    for streamed in group:
        if bucket and sum(other.nbytes for other in bucket) + streamed.nbytes > limit:
            yield bucket
            bucket = ()
        bucket += (streamed,)
    yield bucket


def _concatenated(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return the tensors as one flat message. Does not copy a single tensor."""
    return tensors[0].reshape(-1) if len(tensors) == 1 else torch.cat([tensor.reshape(-1) for tensor in tensors])
