"""A leader's end of a weight sync: it broadcasts its part of the weight stream to the servers, as rank 0 asks.

    rank 0:  OtherLeader (parts.py) ── HTTP with a token of the run, JSON ──→ Leader, on a rank that leads a part of the stream

Change here: what rank 0 can ask of a leader. Rank 0 alone speaks with the servers and decides which bucket is sent next.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch

from dapo_mcore.architecture.manifest import Bucket, buckets
from dapo_mcore.errors import RolloutError
from dapo_mcore.rollout.sglang.launch.methods import MethodServer
from dapo_mcore.rollout.sglang.sync.process_group import RootRank

Weights = Iterator[tuple[str, torch.Tensor]]
_METHODS = ("next_bucket", "bind", "open", "broadcast", "close_group", "dismiss")
_LONG_POLL_S = 10.0
_CLOSE_S = 5.0


@dataclass(frozen=True)
class Offer:
    """A bucket that can be broadcast: the sync and the place in it, whether it is the last, and [name, shape] of the tensors of
    the stream that have come since the bucket before."""

    place: tuple[int, int]
    bucket: Bucket
    last: bool
    taken: list[tuple[str, list[int]]]


class Leader:
    """Sends its part of the stream: a types.SyncPeer. `url` is where rank 0 calls it.

    address       of this machine, as rank 0 and the servers reach it.
    token         a secret of the run; calls without it are refused.
    as_served     turns the stream into the form that the servers load.
    bucket_bytes  size limit of a bucket. Two are in memory: one is sent while the next is gathered.
    timeout_s     for opening a group and for the broadcast of a bucket.
    patience_s    for rank 0 to go on. Afterwards `serve` raises RolloutError.

    `serve` runs in the main thread. Rank 0's calls run in threads of their own. A call names the sync that it is part of by its
    number, since both sides count them: a late call of an earlier sync changes nothing.
    """

    def __init__(
        self,
        address: str,
        token: str,
        *,
        backend: Literal["nccl", "gloo"],
        device: torch.device,
        as_served: Callable[[Weights], Weights],
        bucket_bytes: int,
        timeout_s: float,
        patience_s: float,
    ):
        self._address, self._backend, self._device = address, backend, device
        self._as_served, self._bucket_bytes = as_served, bucket_bytes
        self._timeout, self._patience_s = timedelta(seconds=timeout_s), patience_s
        self._changed = threading.Condition()
        self._sync, self._dismissed, self._asked = 0, 0, (0, 0)
        self._offer: Offer | None = None
        self._problem: str | None = None
        self._roots: dict[str, RootRank] = {}
        self._http = MethodServer(address, token, self, _METHODS)
        self.url = self._http.url
        atexit.register(self.close)

    def serve(self, weights: Weights) -> None:
        """Offer this rank's part of the stream bucket by bucket until rank 0 ends the sync. Drain it in any case.

        An error of the stream is told to rank 0 and raised once rank 0 has ended the sync.
        """
        weights = iter(weights)
        with self._changed:
            self._sync, self._offer, self._problem = self._sync + 1, None, None
        try:
            self._offer_all(weights)
        except Exception as error:
            with self._changed:
                self._problem = f"the weight stream broke off: {error!r}"
                self._changed.notify_all()
            deque(weights, maxlen=0)  # other ranks send what is in it
            raise
        finally:
            self._wait_until(lambda: self._is_dismissed)
            self._offer = None

    def next_bucket(self, sync: int, number: int) -> dict[str, Any] | None:
        """Return what bucket `number` of the sync holds, or None if it is not there after a few seconds: ask again. To ask for
        it says that the buckets before it are sent."""
        place = (sync, number)
        with self._changed:
            self._asked = max(self._asked, place)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._problem or self._offers(place), _LONG_POLL_S)
            if self._offers(place):
                return _described(self._offer)
            if self._problem and self._sync == sync:
                raise RolloutError(self._problem)
        return None

    def bind(self, name: str, world_size: int) -> dict[str, Any]:
        """Make a process group with this rank as its root. Return where and how servers join."""
        root = self._roots[name] = RootRank(name, self._address, world_size, self._backend, self._timeout)
        return {"host": root.host, "port": root.port, "backend": root.backend}

    def open(self, name: str) -> None:
        """Wait until the servers have joined the group. Raise RuntimeError if one fails."""
        with self._on_device():
            self._roots[name].open()

    def broadcast(self, name: str, sync: int, number: int) -> None:
        """Send the bucket to a group. Raise RuntimeError if a server is gone or silent."""
        with self._changed:
            if not self._offers((sync, number)):
                raise RolloutError(f"bucket {number} of sync {sync} is gone")
            bucket = self._offer.bucket
        with self._on_device():
            self._roots[name].broadcast(bucket)

    def close_group(self, name: str) -> None:
        """End a group, also while it waits for a server. May be called twice."""
        if (root := self._roots.pop(name, None)) is not None:
            root.close_soon()

    def dismiss(self, sync: int) -> None:
        """Let `serve` drain what is left of the sync and return."""
        with self._changed:
            self._dismissed = max(self._dismissed, sync)
            self._changed.notify_all()

    def close(self) -> None:
        """Answer no more and end all groups. Wait a few seconds for that, like DistributedSender.close. Runs at exit, too."""
        atexit.unregister(self.close)
        self._http.close()
        end = time.monotonic() + _CLOSE_S
        while self._roots:
            thread = self._roots.popitem()[1].close_soon()
            thread.join(max(end - time.monotonic(), 0.0))

    @property
    def _is_dismissed(self) -> bool:
        return self._dismissed >= self._sync

    def _offers(self, place: tuple[int, int]) -> bool:
        return self._offer is not None and self._offer.place == place

    def _offer_all(self, weights: Weights) -> None:
        taken: list[tuple[str, list[int]]] = []

        def noted() -> Weights:
            for name, tensor in weights:
                taken.append((name, list(tensor.shape)))
                yield name, tensor

        for number, (bucket, last) in enumerate(buckets(self._as_served(noted()), self._bucket_bytes)):
            place = (self._sync, number)
            self._wait_until(lambda: self._is_dismissed or self._asked >= place)  # noqa: B023
            if not self._is_dismissed:
                with self._changed:
                    self._offer = Offer(place, bucket, last, taken.copy())
                    self._changed.notify_all()
            taken.clear()

    def _wait_until(self, happened: Callable[[], bool]) -> None:
        with self._changed:
            if not self._changed.wait_for(happened, self._patience_s):
                raise RolloutError(f"rank 0 has not gone on with a weight sync for {self._patience_s:g} s")

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Use this rank's GPU in the block: a new thread would use the first one."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        yield


def _described(offer: Offer) -> dict[str, Any]:
    tensors = [(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in offer.bucket]
    return {"tensors": tensors, "last": offer.last, "taken": offer.taken}
