"""Only the changed values of weights, by whichever sender carries them.

Change here: which tensors travel as changes, what they are counted from, and when servers get everything. The form of a change
is in server_side/dapo_mcore_delta.py, which applies it.

A `DeltaSender` wraps another sender. Its snapshot holds the weights of one weight_version, the base. A server whose weights
are not the base never gets changes: then all servers of the update get every tensor, which makes a new base. So changes that
one server has missed cannot be lost.
"""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor

from dapo_mcore.architecture.manifest import Bucket
from dapo_mcore.errors import ConfigError
from dapo_mcore.rollout.sglang.client.http import RequestFailed
from dapo_mcore.rollout.sglang.launch.servers import DELTA_LOADER
from dapo_mcore.rollout.sglang.pool.server import Server
from dapo_mcore.rollout.sglang.pool.update import Transaction
from dapo_mcore.rollout.sglang.server_side.dapo_mcore_delta import (
    ALIGNMENT,
    MARK,
    MAX_COLUMNS,
    Entry,
    bit_sums,
    bits,
)
from dapo_mcore.rollout.sglang.sync.sender import Buckets, Sender

_GIB = 2**30
_NO_TENSORS = base64.b64encode(pickle.dumps([])).decode()
_COMPUTED = frozenset({"DeepseekV3ForCausalLM"})
"""Architectures whose weights SGLang joins or multiplies as it loads them."""


def check_delta(architecture: str, num_bytes: int) -> None:
    """Raise ConfigError if SGLang's class cannot take changes, or this machine has no memory for a copy of the weights."""
    if architecture in _COMPUTED:
        raise ConfigError(
            f"rollout.sglang.delta does not go with {architecture}: SGLang joins some of its weights as it loads them, which "
            "needs whole tensors; set delta false"
        )
    free = psutil.virtual_memory().available
    if free < num_bytes:
        raise ConfigError(
            f"rollout.sglang.delta keeps a copy of the weights in rank 0's host memory, {num_bytes / _GIB:.1f} GiB, but "
            f"{free / _GIB:.1f} GiB are free; set delta false"
        )


class DeltaSender:
    """Gives changes to the sender `inner` while all servers hold the base, and whole tensors else.

    bucket_bytes  size limit of a bucket of changes. A larger tensor is alone in one.

    `numbers` has what the last update sent: bytes, the share of changed values, and the bytes of the snapshot.
    Memory: a copy of all weights in host memory (pinned if the weights are on a GPU), and one bucket.
    """

    def __init__(self, inner: Sender[Any], bucket_bytes: int):
        self.inner, self._bucket_bytes = inner, bucket_bytes
        self.stage_metric, self.update_metric, self.reload = inner.stage_metric, inner.update_metric, inner.reload
        self.numbers: dict[str, float] = {}
        self._snapshot = Snapshot()
        self._pool: Sequence[Server] = ()
        self._base: str | None = None

    def empty(self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory for a tensor: from the inner sender if it will travel whole."""
        made = self.inner.empty if self._base is None else torch.empty
        return made(shape, dtype=dtype, device=device)

    def stage(self, buckets: Iterator[tuple[Bucket, bool]], weight_version: str) -> Iterator[tuple[Any, bool]]:
        """Decide what the update sends: changes if every server that can take part holds the snapshot's version."""
        held = {server.weight_version for server in self._pool if server.state in ("serving", "waiting")}
        self._base = self._snapshot.version if held == {self._snapshot.version} else None
        self._snapshot.version = None  # until this update is served: it is overwritten meanwhile
        stream = self._kept(buckets) if self._base is None else self._encoded(buckets)
        return self.inner.stage(stream, weight_version)

    def pack(self, item: Any) -> Any:
        return self.inner.pack(item)

    async def send(self, update: Transaction, buckets: Buckets[Any]) -> None:
        """Let the inner sender send. Before changes, every server shows that it holds the base and learns to take them."""
        self._pool = update.pool
        if self._base is not None:
            await update.each("compare versions", self._check_base)
            await update.each("prepare", _prepare)
        await self.inner.send(update, buckets)

    def finish(self, weight_version: str | None) -> None:
        """Make the snapshot the next base if the update is served; else the next update sends everything."""
        self._snapshot.settle()
        self._snapshot.version = weight_version
        self.inner.finish(weight_version)

    def close(self) -> None:
        self.inner.close()

    async def _check_base(self, server: Server) -> None:
        reported = await server.client.weight_version()
        if not reported == server.weight_version == self._base:
            raise RequestFailed(f"{server.url} holds weights {reported!r}, but changes are counted from {self._base!r}")

    def _kept(self, buckets: Iterator[tuple[Bucket, bool]]) -> Iterator[tuple[Bucket, bool]]:
        """Yield the buckets as they are, and keep a copy."""
        self.numbers = {}
        for bucket, last in buckets:
            for name, tensor in bucket:
                self._snapshot.keep(name, tensor)
            yield bucket, last
            self._snapshot.settle()  # the inner sender uses a bucket's memory again
        self.numbers = {"sync/snapshot_bytes": float(self._snapshot.num_bytes)}

    def _encoded(self, buckets: Iterator[tuple[Bucket, bool]]) -> Iterator[tuple[Bucket, bool]]:
        """Yield buckets of one pair each, the table of their tensors and the bytes. Count what they hold."""
        packing, sent, num_changed, num_values = Packing(), 0, 0, 0
        for bucket, last in buckets:
            while bucket:
                name, new = bucket.pop(0)
                old = self._snapshot.get(name, new)
                entry, pieces, changed = encode(name, new, old)
                if changed:
                    self._snapshot.keep(name, new)
                if packing.num_bytes and packing.num_bytes + entry.num_bytes > self._bucket_bytes:
                    sent += packing.num_bytes
                    yield [packing.bucket()], False
                    packing = Packing()
                packing.add(entry, pieces)
                num_changed, num_values = num_changed + changed, num_values + new.numel()
            if last:
                sent += packing.num_bytes
                share, kept = num_changed / max(num_values, 1), float(self._snapshot.num_bytes)
                counts = {"sync/delta_bytes": float(sent), "sync/changed_share": share}
                self.numbers = {**counts, "sync/snapshot_bytes": kept}
                yield [packing.bucket()], True


def encode(name: str, new: Tensor, old: Tensor | None) -> tuple[Entry, list[Tensor], int]:
    """Return the entry of a tensor (with start 0), its parts in order and how many values have changed.

    Values are compared by their bits. Whole tensors travel if that takes fewer bytes, or if there is no old one.
    """
    new = new.contiguous()
    whole = Entry(name, tuple(new.shape), new.dtype, 0, None)
    if old is None:
        return whole, [new], new.numel()
    changed = bits(new) != bits(old)
    count = int(changed.count_nonzero())
    if new.dim() != 2 or new.shape[1] > MAX_COLUMNS:
        return whole, [new], count
    sparse = Entry(name, whole.shape, new.dtype, 0, count)
    if sparse.num_bytes >= whole.num_bytes:
        return whole, [new], count
    flat, (height, width) = changed.view(-1).nonzero().view(-1), new.shape
    counts = (flat // width).bincount(minlength=height).to(torch.int32)
    columns = (flat % width).to(torch.int16)  # the lower 16 bits
    return sparse, [bit_sums(new, 1), bit_sums(new, 0), counts, new.view(-1)[flat], columns], count


class Packing:
    """Tensors on their way into one bucket."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._entries: list[Entry] = []
        self._pieces: list[Tensor] = []

    def add(self, entry: Entry, pieces: list[Tensor]) -> None:
        self._entries.append(Entry(entry.name, entry.shape, entry.dtype, self.num_bytes, entry.num_changed))
        self._pieces += [piece.view(-1).view(torch.uint8) for piece in pieces]
        padding = -entry.num_bytes % ALIGNMENT
        self._pieces.append(self._pieces[-1].new_zeros(padding))
        self.num_bytes += entry.num_bytes + padding

    def bucket(self) -> tuple[str, Tensor]:
        """Return the table as a name, and uint8 [num_bytes]."""
        return MARK + json.dumps([entry.to_json() for entry in self._entries]), torch.cat(self._pieces)


class Snapshot:
    """Copies of weights in host memory, and the weight_version that they make up; None while they are mixed.

    Copies of weights on a GPU are pinned. They lie in slabs, since torch rounds a block of pinned memory up to a power of two.
    They are written by a CUDA stream of their own: the bus carries the copies out while it brings older ones in. `settle` waits
    for that. In one update, `get` a name before you `keep` it.
    """

    def __init__(self, slab_bytes: int = _GIB):
        self.version: str | None = None
        self.num_bytes = 0
        self._copies: dict[str, Tensor] = {}
        self._slab_bytes, self._slab, self._used = slab_bytes, torch.empty(0, dtype=torch.uint8), 0
        self._writing: torch.cuda.Stream | None = None

    def keep(self, name: str, tensor: Tensor) -> None:
        """Copy the tensor. On a GPU the copy is only queued, until `settle`."""
        copy = self._copies.get(name)
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            copy = self._copies[name] = self._new(tensor)
        if not tensor.is_cuda:
            copy.copy_(tensor)
            return
        if self._writing is None:
            self._writing = torch.cuda.Stream(tensor.device)
        self._writing.wait_stream(
            torch.cuda.current_stream(tensor.device)
        )  # the tensor is whole, and the old copy is read
        with torch.cuda.stream(self._writing):
            copy.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._writing)

    def settle(self) -> None:
        """Wait until everything is copied. The weights may change, and `get` may be called, only after that."""
        if self._writing is not None:
            self._writing.synchronize()

    def get(self, name: str, like: Tensor) -> Tensor | None:
        """Return the copy on the device of `like`, or None if there is none of its shape and dtype."""
        copy = self._copies.get(name)
        if copy is None or copy.shape != like.shape or copy.dtype != like.dtype:
            return None
        return copy.to(like.device, non_blocking=like.is_cuda)

    def _new(self, tensor: Tensor) -> Tensor:
        start = -(-self._used // 256) * 256
        if start + tensor.nbytes > self._slab.nbytes:
            size = max(tensor.nbytes, self._slab_bytes if tensor.is_cuda else 0)
            self._slab, start = torch.empty(size, dtype=torch.uint8, pin_memory=tensor.is_cuda), 0
            self.num_bytes += size
        self._used = start + tensor.nbytes
        return self._slab[start : self._used].view(tensor.dtype).view(tensor.shape)


async def _prepare(server: Server) -> None:
    """Make the server's model take changes. In a session of its own: a sender opens the next one itself."""
    client = server.client
    await client.begin_weight_update()
    await client.update_weights_from_tensor([_NO_TENSORS] * server.num_ranks, None, load_format=DELTA_LOADER)
    await client.end_weight_update()
