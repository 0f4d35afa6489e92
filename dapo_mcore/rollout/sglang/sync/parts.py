"""The parts of one weight stream, as rank 0 brings them together: its own, and those of other leaders (leader.py).

Change here: in which order the buckets of several leaders are sent, and how they are checked together.

A server takes one bucket at a time, whoever sends it: SGLang holds a lock while a bucket is received, and its ranks work on one
request after the other. Servers in one group must take the buckets in the same order, or each waits for another one. So rank 0
sends them one by one, in the order in which they are ready. Meanwhile every leader gathers its next bucket.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol
from urllib.error import HTTPError

import torch

from dapo_mcore.architecture.manifest import Bucket, StreamCheck
from dapo_mcore.errors import RolloutError
from dapo_mcore.rollout.sglang.client.http import RequestFailed
from dapo_mcore.rollout.sglang.launch.methods import MethodClient
from dapo_mcore.rollout.sglang.sync.process_group import in_daemon
from dapo_mcore.rollout.sglang.sync.sender import Buckets

_CALL_S = 30.0
_CLOSE_S = 5.0


class Outgoing(NamedTuple):
    """A bucket to send, and the number of its leader; 0 is this rank. Other leaders' tensors are on the meta device."""

    bucket: Bucket
    leader: int = 0

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self.bucket)


class Root(Protocol):
    """The root of a group of servers, here (process_group.RootRank) or on another leader. `open` and `broadcast` block."""

    name: str
    host: str
    port: int
    backend: str

    def open(self) -> None: ...

    def broadcast(self, bucket: Bucket) -> None: ...

    def close_soon(self) -> threading.Thread: ...


class OtherLeader:
    """Calls a Leader on another rank. Raises RequestFailed for what fails there, and if it does not answer.

    number     its place among the leaders, from 1 on.
    timeout_s  for opening a group and for the broadcast of a bucket.
    """

    def __init__(self, number: int, url: str, token: str, timeout_s: float):
        self._number, self._timeout_s = number, timeout_s
        self._methods = MethodClient(url, token)
        self._sync, self._bucket = 0, 0

    def begin(self, sync: int) -> None:
        self._sync, self._bucket = sync, -1

    async def parts(self, check: StreamCheck) -> AsyncIterator[tuple[Outgoing, bool]]:
        """Yield its buckets, and True with the last. To ask for the next one says that the one before it is sent."""
        last = False
        while not last:
            self._bucket += 1
            offer = None
            while offer is None:
                offer = await in_daemon(self._call, "next_bucket", _CALL_S, self._place())
            for name, shape in offer["taken"]:
                check.take(name, shape)
            bucket = [
                (name, torch.empty(shape, dtype=getattr(torch, dtype), device="meta"))
                for name, dtype, shape in offer["tensors"]
            ]
            last = offer["last"]
            yield Outgoing(bucket, self._number), last

    def root(self, name: str, world_size: int) -> OtherRoot:
        """Make a process group there. Blocks."""
        return OtherRoot(self, name, **self._call("bind", _CALL_S, {"name": name, "world_size": world_size}))

    def open(self, name: str) -> None:
        self._call("open", self._timeout_s, {"name": name})

    def broadcast(self, name: str) -> None:
        self._call("broadcast", self._timeout_s, {"name": name, **self._place()})

    def close_group(self, name: str) -> None:
        self._call("close_group", _CLOSE_S, {"name": name})

    def dismiss(self) -> None:
        self._call("dismiss", _CALL_S, {"sync": self._sync})

    def _place(self) -> dict[str, int]:
        return {"sync": self._sync, "number": self._bucket}

    def _call(self, method: str, timeout_s: float, arguments: dict[str, Any]) -> Any:
        try:
            return self._methods.call(method, timeout_s, **arguments)
        except HTTPError as error:
            raise RequestFailed(
                f"a leader of the weight sync, {self._methods.url}: {json.loads(error.read())}"
            ) from error
        except OSError as error:
            raise RequestFailed(
                f"a leader of the weight sync, {self._methods.url}, does not answer: {error}"
            ) from error


class OtherRoot:
    """The root of a group on another leader: a Root."""

    def __init__(self, leader: OtherLeader, name: str, host: str, port: int, backend: str):
        self.name, self.host, self.port, self.backend = name, host, port, backend
        self._leader = leader

    def open(self) -> None:
        self._leader.open(self.name)

    def broadcast(self, bucket: Bucket) -> None:
        self._leader.broadcast(self.name)

    def close_soon(self) -> threading.Thread:
        """End the group from a new thread and return that thread. A leader that is gone has no group."""

        def close() -> None:
            with suppress(RolloutError):
                self._leader.close_group(self.name)

        thread = threading.Thread(target=close, name=f"close {self.name}", daemon=True)
        thread.start()
        return thread


class OtherLeaders:
    """All leaders but this rank.

    urls       of the leaders, in the order of their ranks.
    timeout_s  as for OtherLeader; also how long the next bucket of all leaders may take to be gathered.

    `num_bytes` counts what they have sent in the last sync.
    """

    def __init__(self, urls: Sequence[str], token: str, timeout_s: float):
        self._leaders = [OtherLeader(number, url, token, timeout_s) for number, url in enumerate(urls, 1)]
        self._timeout_s = timeout_s
        self._sync, self._dismissed = 0, 0
        self.num_bytes = 0

    @property
    def roots(self) -> list[Callable[[str, int], Root]]:
        """Functions that make a root on each leader, from a group's name and its number of ranks."""
        return [leader.root for leader in self._leaders]

    def begin(self) -> None:
        """Begin the next sync. Each leader counts them too."""
        self._sync, self.num_bytes = self._sync + 1, 0
        for leader in self._leaders:
            leader.begin(self._sync)

    async def join(self, own: Buckets[Outgoing], check: StreamCheck, weight_version: str) -> Buckets[Outgoing]:
        """Yield the buckets of `own` and of every leader, one by one as they are ready.

        The last of all brings the weight_version. Before it, raise RolloutError if anything in the parts together does not fit
        the model; from the first mistake on, nothing is yielded. Raise RolloutError too if no bucket comes in time.
        """
        sources = [_until_last(own), *(leader.parts(check) for leader in self._leaders)]
        asking = {_next(source): source for source in sources}
        try:
            while asking:
                ready, _ = await asyncio.wait(asking, timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED)
                if not ready:
                    raise RolloutError(f"no leader has gathered its next bucket within {self._timeout_s:g} s")
                for task in ready:
                    source, (outgoing, last) = asking.pop(task), task.result()
                    if last and not asking:
                        check.finish()
                    if check.fits:
                        self.num_bytes += outgoing.num_bytes if outgoing.leader else 0
                        yield outgoing, weight_version if last and not asking else None
                    if not last:
                        asking[_next(source)] = source
        finally:
            for task in asking:
                task.cancel()

    def dismiss(self) -> None:
        """Let every leader drain the rest of its part. Blocks. Raise RequestFailed if one does not answer."""
        if self._dismissed < self._sync:
            for leader in self._leaders:
                leader.dismiss()
            self._dismissed = self._sync


def _next(source: AsyncIterator[tuple[Outgoing, bool]]) -> asyncio.Future[tuple[Outgoing, bool]]:
    task = asyncio.ensure_future(anext(source))
    task.add_done_callback(
        lambda done: done.cancelled() or done.exception()
    )  # nobody asks once another leader has failed
    return task


async def _until_last(own: Buckets[Outgoing]) -> AsyncIterator[tuple[Outgoing, bool]]:
    async for outgoing, weight_version in own:
        yield outgoing, weight_version is not None
