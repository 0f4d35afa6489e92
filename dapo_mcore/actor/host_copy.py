"""Device memory that moves to the host and back, and how much host memory that takes.

Change here: where the values wait. memory.py decides what moves, and `dapo-mcore plan` counts with the same sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import psutil
import torch
from torch import Tensor, UntypedStorage

from dapo_mcore.errors import ResourceError

GIB = 2**30
PIECE = 2**28
"""Bytes of a host buffer. torch rounds pinned memory up to a power of two (CachingHostAllocator.h), so one buffer per storage
would take up to twice as much."""


class HostCopy:
    """The values of storages that have no memory, one after the other in host buffers. Buffers are pinned once and reused.

    num_ranks  the trainer's ranks on this machine; all of them offload at the same time
    """

    def __init__(self, pinned: bool, num_ranks: int = 1):
        self._pinned, self._num_ranks = pinned, num_ranks
        self._buffers: list[Tensor] = []
        self._offloaded: list[tuple[UntypedStorage, int]] = []

    @property
    def nbytes(self) -> int:
        """Return the host memory that the buffers take, in bytes."""
        return self._taken([buffer.nbytes for buffer in self._buffers])

    def offload(self, given: Iterable[UntypedStorage]) -> None:
        """Copy the storages to the host and free their device memory. Raises ResourceError if the host has too little."""
        assert not self._offloaded, "offloaded already"
        offloaded = [(storage, storage.nbytes()) for storage in given]
        self._allocate(sum(nbytes for _, nbytes in offloaded))
        for on_device, on_host in self._parts(offloaded):
            on_host.copy_(on_device, non_blocking=True)
        if self._pinned:
            torch.cuda.synchronize()
        for storage, _ in offloaded:
            storage.resize_(0)
        self._offloaded = offloaded

    def onload(self) -> None:
        """Give the storages memory again and copy their values back."""
        for storage, nbytes in self._offloaded:
            storage.resize_(nbytes)
        for on_device, on_host in self._parts(self._offloaded):
            on_device.copy_(on_host, non_blocking=True)
        if self._pinned:
            torch.cuda.synchronize()
        self._offloaded = []

    def _parts(self, storages: Iterable[tuple[UntypedStorage, int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the bytes of the storages in parts that lie in one buffer each, on the device and on the host."""
        position = 0
        for storage, nbytes in storages:
            whole, done = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage), 0
            while done < nbytes:
                number, start = divmod(position, PIECE)
                size = min(nbytes - done, PIECE - start)
                yield whole[done : done + size], self._buffers[number][start : start + size]
                done, position = done + size, position + size

    def _allocate(self, total: int) -> None:
        sizes = buffer_sizes(total)
        if [buffer.nbytes for buffer in self._buffers] == sizes:
            return
        self._buffers = []
        needed, memory = self._taken(sizes), psutil.virtual_memory()
        # ranks allocate at the same time: each could find enough available memory, and all together be killed
        if needed > memory.available or self._num_ranks * needed > memory.total:
            raise ResourceError(
                f"rollout.sglang.colocated keeps {needed / GIB:.1f} GiB of this rank's actor on the host during generation, "
                f"on each of this machine's {self._num_ranks} ranks, but {memory.available / GIB:.1f} GiB of host memory are "
                f"available, of {memory.total / GIB:.1f}; use more nodes, or servers on GPUs of their own (colocated false)"
            )
        self._buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned) for size in sizes]

    def _taken(self, sizes: list[int]) -> int:
        return sum(pinned_bytes(size) if self._pinned else size for size in sizes)


def buffer_sizes(total: int) -> list[int]:
    """Return the bytes of each host buffer for so many bytes: pieces of equal size, and the rest."""
    whole, rest = divmod(total, PIECE)
    return [PIECE] * whole + [rest] * (rest > 0)


def pinned_bytes(nbytes: int) -> int:
    """Return the bytes that torch takes for pinned memory of `nbytes`: the next power of two."""
    return 1 << (nbytes - 1).bit_length() if nbytes else 0
