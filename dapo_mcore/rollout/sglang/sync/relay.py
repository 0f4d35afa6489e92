"""Weights in the shared memory of other nodes: the first rank of each node receives every bucket from rank 0 and shares it there.

    rank 0:  TensorSender ── Relays ──→ broadcast of a bucket to one rank per node
    relay:   Relay ── SharedBucket of its node ── handle ──→ rank 0, which gives it to that node's servers by HTTP

Change here: what rank 0 and relays say to each other. When memory may be used again is in tensor.py, how it is shared in
shared_bucket.py. Handles are pickles for servers; no trainer process unpickles them.

For each bucket rank 0 gives two orders, and every relay answers each: Prepare, then Receive. A relay that cannot prepare says
so, and no bytes are sent. Broadcasts run in rank 0's main thread, between two messages of the weight stream: on GPUs its
messages and the buckets travel by different NCCL communicators, whose calls all ranks must make in one order. A relay that
holds shards sends them meanwhile in another thread, and has at most one message queued on its GPU (actor/weight_stream.py).
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_mcore.errors import RolloutError
from dapo_mcore.rollout.sglang.sync.process_group import daemon
from dapo_mcore.rollout.sglang.sync.shared_bucket import ReadBuckets, SharedBucket, Table


class Prepare(NamedTuple):
    """Get memory for a bucket. `num_read` is how many of the buckets before it may still be read."""

    table: Table
    num_read: int


class Receive(NamedTuple):
    """Receive the bytes of the prepared bucket, and answer with a handle for `num_openers` processes."""

    num_openers: int


Order = Prepare | Receive | None
"""What rank 0 asks for; None ends the update."""


class Answer(NamedTuple):
    """What a relay says to an order: the handle of a received bucket, or the problem."""

    handle: str = ""
    problem: str = ""


class RelayGroup:
    """The process groups of rank 0 and the relays: gloo for messages and, on GPUs, NCCL for buckets.

    ranks    of the trainer, one on each node, rank 0 first.
    timeout  of every wait for another rank.
    Collective: creates groups, so every rank of the job must make one. Its members also send a byte, which connects NCCL: a
    connection that is made beside other messages may wait for them.
    """

    def __init__(self, ranks: Sequence[int], device: torch.device, timeout: timedelta):
        self.ranks, self.device = tuple(ranks), device
        self._messages = dist.new_group(self.ranks, backend="gloo", timeout=timeout)
        on_gpu = device.type == "cuda"
        self._bytes = dist.new_group(self.ranks, backend="nccl", timeout=timeout) if on_gpu else self._messages
        if dist.get_rank() in self.ranks:
            self.broadcast(torch.zeros(1, dtype=torch.uint8, device=device))

    def broadcast(self, data: Tensor) -> None:
        """Send rank 0's bytes to the relays, into the same memory there. On GPUs the device may still be at it."""
        dist.broadcast(data, 0, group=self._bytes)

    def tell(self, order: Order) -> None:
        """Send an order. Rank 0 only."""
        dist.broadcast_object_list([order], 0, group=self._messages)

    def hear(self) -> Order:
        """Wait for rank 0's next order and return it. Relays only."""
        box: list[Order] = [None]
        dist.broadcast_object_list(box, 0, group=self._messages)
        return box[0]

    def answer(self, answer: Answer) -> None:
        """Answer the last order. Relays only."""
        dist.gather_object(answer, None, 0, group=self._messages)

    def answers(self) -> dict[int, Answer]:
        """Wait for the answers of all relays and return them by rank. Rank 0 only."""
        found: list[Any] = [None] * len(self.ranks)
        dist.gather_object(Answer(), found, 0, group=self._messages)
        return dict(zip(self.ranks[1:], found[1:], strict=True))


class Relays:
    """Rank 0's end: all relays as one."""

    def __init__(self, group: RelayGroup):
        self._group = group

    def share(self, shared: SharedBucket, num_read: int, num_openers: int) -> dict[int, str]:
        """Share the same bytes on the nodes of all relays. Return the handles by the relays' ranks.

        Raise RolloutError with the node and the reason if a relay has no memory for them.
        """
        self._ask(Prepare(shared.table, num_read))
        answers = self._ask(Receive(num_openers), lambda: self._group.broadcast(shared.data))
        shared.wait()
        return {rank: answer.handle for rank, answer in answers.items()}

    def dismiss(self) -> None:
        """End the update at all relays."""
        self._group.tell(None)

    def _ask(self, order: Order, meanwhile: Callable[[], None] = lambda: None) -> dict[int, Answer]:
        self._group.tell(order)
        meanwhile()
        answers = self._group.answers()
        if problems := [answer.problem for answer in answers.values() if answer.problem]:
            raise RolloutError(f"{len(problems)} of {len(answers)} relays cannot share a bucket: {'; '.join(problems)}")
        return answers


class Relay:
    """The end of a rank that shares the buckets on its node; a types.SyncPeer.

    Memory: as on rank 0, one bucket, or two if servers have several ranks. All is given back when the update ends.
    """

    def __init__(self, group: RelayGroup):
        self._group = group
        self._name = f"node {socket.gethostname()}, rank {dist.get_rank()}"
        self._buckets = ReadBuckets()
        self._next: SharedBucket | None = None

    def serve(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Obey rank 0's orders, and meanwhile send this rank's shards, until the update has ended.

        Both run in threads of their own, and an error of either is raised at once: the other may wait for a rank that is gone.
        """
        works = [daemon(deque, weights, 0), daemon(self._obey)]
        for work in wait(works, return_when=FIRST_EXCEPTION).done:
            work.result()

    def _obey(self) -> None:
        try:
            while (order := self._group.hear()) is not None:
                self._group.answer(self._prepare(order) if isinstance(order, Prepare) else self._receive(order))
        finally:
            self._next = None
            self._buckets.close()

    def _prepare(self, order: Prepare) -> Answer:
        try:
            new = partial(SharedBucket.empty, order.table, self._group.device)
            self._next = self._buckets.add(new, order.num_read)
        except Exception as error:  # rank 0 ends the update, and then the run or another try follows
            return Answer(problem=f"{self._name}: {error}")
        return Answer()

    def _receive(self, order: Receive) -> Answer:
        self._group.broadcast(self._next.data)
        self._next.wait()
        return Answer(handle=self._next.handle(order.num_openers))
