"""Weights to servers by files that they load.

Change here: how weights lie on disk, and when they are deleted.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import psutil
import torch

from dapo_mcore.architecture.manifest import Bucket
from dapo_mcore.errors import ConfigError, RolloutError
from dapo_mcore.model_files.safetensors_file import SafetensorsWriter, TensorInfo
from dapo_mcore.rollout.sglang.pool.server import Server
from dapo_mcore.rollout.sglang.pool.update import Transaction
from dapo_mcore.rollout.sglang.sync.address import on_other_machines
from dapo_mcore.rollout.sglang.sync.sender import Buckets

GIB = 2**30


def check_sync_dir(folder: Path, urls: Sequence[str]) -> None:
    """Raise ConfigError if `folder` is in this machine's memory and some servers at `urls` are on others."""
    where = folder.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if where.is_relative_to(part.mountpoint)]
    in_memory = max(mounts, key=lambda part: len(part.mountpoint)).fstype in ("tmpfs", "ramfs")
    if in_memory and (strangers := on_other_machines(urls)):
        raise ConfigError(
            f"rollout.sglang.sync_dir {folder} is in this machine's memory, but {len(strangers)} of {len(urls)} servers are on "
            f"others: {', '.join(strangers)}; set sync_dir to a folder that all nodes see under the same path"
        )


class DiskSender:
    """Writes weights as safetensors into a folder that the servers see too, and keeps them for servers that come back.

    root/WEIGHT_VERSION.partial is written bucket by bucket while the servers still generate, and renamed when it is whole.
    Then every server loads it. It is deleted once the next weights are served. The folder must hold two versions of the
    model. Raise ConfigError if it cannot.
    """

    stage_metric, update_metric = "sync/write_s", "sync/load_s"
    numbers: ClassVar[dict[str, float]] = {}
    empty = staticmethod(torch.empty)

    def __init__(self, root: Path, num_bytes: int):
        self.root = root
        shutil.rmtree(root, ignore_errors=True)  # left by a run that was killed
        try:
            root.mkdir(mode=0o700, parents=True)
            # tools/slurm/node.sh deletes what a killed run has left: nobody has it locked any more
            self._lock: int | None = os.open(root, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks
                fcntl.flock(self._lock, fcntl.LOCK_SH)
            free = shutil.disk_usage(root).free
        except OSError as error:
            raise ConfigError(f"rollout.sglang.sync_dir: {error}; choose a folder that can be written") from error
        if free < 2 * num_bytes:
            raise ConfigError(
                f"rollout.sglang.sync_dir has {free / GIB:.1f} GiB free in {root.parent}, but two versions of the model "
                f"need {2 * num_bytes / GIB:.1f} GiB; choose a larger folder, or sync distributed"
            )

    def stage(self, buckets: Iterator[tuple[Bucket, bool]], weight_version: str) -> Iterator[tuple[Path, bool]]:
        """Write all buckets, each while the next one is gathered, and return their folder as the only item.

        Raise RolloutError if the disk is full.
        """
        unfinished, folder = self.root / f"{weight_version}.partial", self.root / weight_version
        num_bytes, written = 0, None
        try:
            unfinished.mkdir()
            with ThreadPoolExecutor(1) as writer:
                for number, (bucket, _) in enumerate(buckets):
                    if written is not None:
                        written.result()
                    written = writer.submit(_write_file, unfinished / f"{number:05d}.safetensors", bucket)
                    num_bytes += sum(tensor.nbytes for _, tensor in bucket)
                written.result()
            unfinished.rename(folder)
        except OSError as error:
            raise RolloutError(
                f"weights cannot be written to rollout.sglang.sync_dir: {error}; after {num_bytes / GIB:.2f} GiB, "
                f"{shutil.disk_usage(self.root).free / GIB:.2f} GiB are free there; make room or choose another folder"
            ) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return iter([(folder, True)])

    def pack(self, folder: Path) -> Path:
        return folder

    async def send(self, update: Transaction, buckets: Buckets[Path]) -> None:
        """Make every server load the folder."""
        async for folder, weight_version in buckets:
            await update.each("load", lambda s: s.client.update_weights_from_disk(str(folder), weight_version))  # noqa: B023

    async def reload(self, server: Server, weight_version: str) -> None:
        await server.client.update_weights_from_disk(str(self.root / weight_version), weight_version)

    def finish(self, weight_version: str | None) -> None:
        """Delete all weights but those that are served now."""
        if weight_version is None:
            return
        for folder in self.root.iterdir():
            if folder.name != weight_version:  # NFS keeps a file that a server has open: the next update deletes it
                shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _write_file(path: Path, bucket: Bucket) -> None:
    file = SafetensorsWriter(path, {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in bucket})
    for name, tensor in bucket:
        file.write(name, tensor)
    file.close()
