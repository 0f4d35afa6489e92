"""The weight stream to servers by files that they load.

Change here: how a version lies on disk, and when it is deleted. Fleet.update makes it a transaction.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from dapo_mcore.architecture.manifest import Bucket
from dapo_mcore.errors import ConfigError, RolloutError
from dapo_mcore.model_files.safetensors_file import SafetensorsWriter, TensorInfo
from dapo_mcore.rollout.sglang.client.loop_thread import LoopThread
from dapo_mcore.rollout.sglang.pool.pool import Fleet
from dapo_mcore.rollout.sglang.pool.server import Member
from dapo_mcore.rollout.sglang.pool.transaction import Transaction

GIB = 2**30


class DiskTransfer:
    """Weights as safetensors in a folder that the servers see too, kept for servers that come back.

    root/TAG.partial is written bucket by bucket, renamed when whole, loaded by every server, and deleted once the next
    version is served. Two versions of the model must fit; ConfigError where they do not.
    """

    empty = staticmethod(torch.empty)

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
            if folder.name != tag:  # NFS keeps a file that a server has open: then the next update deletes it
                shutil.rmtree(folder, ignore_errors=True)
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
        await transaction.each("load", lambda m: self.resync(m, transaction.tag))


def _write_file(path: Path, bucket: Bucket) -> None:
    file = SafetensorsWriter(path, {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in bucket})
    for name, tensor in bucket:
        file.write(name, tensor)
    file.close()
