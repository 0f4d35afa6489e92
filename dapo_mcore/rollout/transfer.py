"""How the tensors of a weight stream reach the servers: by files they load, or by a broadcast they receive.

Change here: the ways weights travel. Fleet.update makes either a transaction; manifest.py has checked the tensors.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from dapo_mcore.errors import ConfigError, RolloutError
from dapo_mcore.rollout.fleet import Fleet, Transaction
from dapo_mcore.rollout.http import RequestFailed, RequestRefused
from dapo_mcore.rollout.loop_thread import LoopThread
from dapo_mcore.rollout.manifest import Bucket
from dapo_mcore.rollout.member import Member
from dapo_mcore.weights.safetensors_file import SafetensorsWriter, TensorInfo

GIB = 2**30


class DiskTransfer:
    """Weights as safetensors in a folder that the servers see too, kept for servers that come back.

    root/TAG.partial is written bucket by bucket, renamed when whole, loaded by every server, and deleted once the next
    version is served. Two versions of the model must fit; ConfigError where they do not.
    """

    def __init__(self, root: Path, num_bytes: int):
        self.root = root
        shutil.rmtree(root, ignore_errors=True)  # of a run that was killed
        try:
            root.mkdir(mode=0o700, parents=True)
            free = shutil.disk_usage(root).free
        except OSError as error:
            raise ConfigError(f"rollout.sglang.sync_dir: {error}; choose a folder that can be written") from error
        if free < 2 * num_bytes:
            raise ConfigError(
                f"rollout.sglang.sync_dir has {free / GIB:.1f} GiB free in {root.parent}, but two versions of the model "
                f"need {2 * num_bytes / GIB:.1f} GiB; choose a larger folder, or sync distributed"
            )

    def send(
        self, buckets: Iterator[tuple[Bucket, bool]], tag: str, fleet: Fleet, loop: LoopThread
    ) -> dict[str, float]:
        """Metrics of the update that gave every serving server the stream's weights."""
        start = time.perf_counter()
        num_bytes = self._write(buckets, tag)
        written = time.perf_counter()
        loop.run(fleet.update(tag, self._load_everywhere))
        for folder in self.root.iterdir():
            if folder.name != tag:
                shutil.rmtree(folder)
        return {"sync/write_s": written - start, "sync/load_s": time.perf_counter() - written, "sync/bytes": num_bytes}

    async def resync(self, member: Member, tag: str) -> None:
        await member.api.load_from_disk(str(self.root / tag), tag)

    def close(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)

    def _write(self, buckets: Iterator[tuple[Bucket, bool]], tag: str) -> float:
        unfinished = self.root / f"{tag}.partial"
        num_bytes, written = 0, None
        try:
            unfinished.mkdir()
            with ThreadPoolExecutor(1) as writer:  # one bucket is written while the next is gathered
                for number, (bucket, _) in enumerate(buckets):
                    if written is not None:
                        written.result()
                    written = writer.submit(_write_file, unfinished / f"{number:05d}.safetensors", bucket)
                    num_bytes += sum(tensor.nbytes for _, tensor in bucket)
                written.result()
            unfinished.rename(self.root / tag)
        except OSError as error:
            raise RolloutError(
                f"weights cannot be written to rollout.sglang.sync_dir: {error}; after {num_bytes / GIB:.2f} GiB, "
                f"{shutil.disk_usage(self.root).free / GIB:.2f} GiB are free there; make room or choose another folder"
            ) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return float(num_bytes)

    async def _load_everywhere(self, transaction: Transaction) -> None:
        await transaction.each("pause", lambda m: m.api.pause())
        await transaction.each("load", lambda m: self.resync(m, transaction.tag))


class BroadcastTransfer:
    """Weights by a broadcast from this process, in a process group for each server: one that dies holds up no other.

    Nothing is kept, so a server that was out gets weights at the next update. The gather of a bucket overlaps with the
    sending of the one before it: two buckets are in memory.
    """

    def __init__(self, host: str, backend: Literal["nccl", "gloo"], timeout_s: float):
        self._host, self._backend, self._timeout = host, backend, timedelta(seconds=timeout_s)
        self._joining = asyncio.Lock()

    def send(
        self, buckets: Iterator[tuple[Bucket, bool]], tag: str, fleet: Fleet, loop: LoopThread
    ) -> dict[str, float]:
        """Metrics of the update that gave every serving server the stream's weights."""
        start = time.perf_counter()
        ready: asyncio.Queue[tuple[Bucket, bool] | Exception] = asyncio.Queue(maxsize=1)
        update = loop.submit(fleet.update(tag, lambda transaction: self._broadcast(transaction, ready)))
        num_bytes = 0
        try:
            for bucket, last in buckets:
                num_bytes += sum(tensor.nbytes for _, tensor in bucket)
                _hand_over((bucket, last), ready, update, loop)
        except BaseException as error:
            _hand_over(RolloutError(f"the weight stream broke off: {error!r}"), ready, update, loop)
            wait([update])
            raise
        update.result()
        return {"sync/broadcast_s": time.perf_counter() - start, "sync/bytes": float(num_bytes)}

    def close(self) -> None:
        """Nothing: the groups end with the servers or with this process."""

    async def _broadcast(self, transaction: Transaction, ready: asyncio.Queue) -> None:
        await transaction.each("pause", lambda m: m.api.pause())
        await transaction.each("join", self._join)
        await transaction.each("begin", _begin)
        last = False
        while not last:
            item = await ready.get()
            if isinstance(item, Exception):
                raise item
            bucket, last = item
            final_version = transaction.tag if last else None
            await transaction.each("receive", partial(_send_bucket, bucket, final_version))
            ready.task_done()
        await transaction.each("end", lambda m: m.api.end_update())

    async def _join(self, member: Member) -> None:
        if member.link is not None:
            return
        async with self._joining:  # torch registers groups in tables without a lock
            link = _Link(
                f"weights-{secrets.token_hex(4)}", self._host, member.num_ranks + 1, self._backend, self._timeout
            )
            joined = member.api.join_group(link.name, self._host, link.port, link.world_size, self._backend)
            await asyncio.gather(joined, asyncio.to_thread(link.open))
        member.link = link


class _Link:
    """This process's end of the group with one server: rank 0; SGLang's `init_custom_process_group` is the other end."""

    def __init__(self, name: str, host: str, world_size: int, backend: str, timeout: timedelta):
        self.name, self.world_size = name, world_size
        self._host, self._backend, self._timeout = host, backend, timeout
        # TCPStore by itself listens on every interface
        self._listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.port = self._listener.getsockname()[1]

    def open(self) -> None:
        store = dist.TCPStore(
            self._host,
            self.port,
            self.world_size,
            is_master=True,
            wait_for_workers=False,
            timeout=self._timeout,
            master_listen_fd=self._listener.detach(),
        )
        self._group, _ = c10d._new_process_group_helper(
            self.world_size,
            0,
            [],
            c10d.Backend(self._backend),
            c10d.PrefixStore(self.name, store),
            group_name=self.name,
            timeout=self._timeout,
        )

    def broadcast(self, bucket: Bucket) -> None:
        for work in [self._group.broadcast(tensor.contiguous(), 0) for _, tensor in bucket]:
            work.wait()


async def _begin(member: Member) -> None:
    try:
        await member.api.begin_update()
    except RequestRefused:  # left open by an update that was broken off
        await member.api.end_update()
        await member.api.begin_update()


async def _send_bucket(bucket: Bucket, final_version: str | None, member: Member) -> None:
    received = member.api.receive(bucket, member.link.name, final_version)
    try:
        await asyncio.gather(received, asyncio.to_thread(member.link.broadcast, bucket))
    except RuntimeError as error:  # torch's word for a peer that is gone or silent
        raise RequestFailed(f"the broadcast to {member.api.url} failed: {error}") from error


def _hand_over(item: tuple[Bucket, bool] | Exception, ready: asyncio.Queue, update: Future, loop: LoopThread) -> None:
    """Waits until the bucket before is sent, unless nobody will take this one any more."""

    async def put() -> None:
        await ready.join()
        await ready.put(item)

    handed = loop.submit(put())
    wait([handed, update], return_when=FIRST_COMPLETED)
    if not handed.done():
        handed.cancel()


def _write_file(path: Path, bucket: Bucket) -> None:
    file = SafetensorsWriter(path, {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in bucket})
    for name, tensor in bucket:
        file.write(name, tensor)
    file.close()
