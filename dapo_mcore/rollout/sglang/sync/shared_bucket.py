"""A bucket of weights in one piece of memory that other processes of this machine can open: CUDA IPC memory on a GPU, POSIX
shared memory on a CPU.

Change here: how memory is shared, and what a handle contains. tensor.py and relay.py decide when a bucket is given back.
"""

from __future__ import annotations

import base64
import os
import pickle
import shutil
import weakref
from collections import deque
from collections.abc import Callable, Container
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from dapo_mcore.architecture.manifest import Bucket
from dapo_mcore.errors import RolloutError

_ALIGNMENT = 256  # views of any dtype, and loads of any width
_SHARED_MEMORY = Path("/dev/shm")
_MIB = 2**20
# positions in the arguments of rebuild_cuda_tensor; SGLang's utils/patch_torch.py relies on the first, too
_DEVICE, _COUNTER = 6, slice(11, 13)
_NO_COUNTER = (b"/dapo_mcore_counts_no_openers", 0)


Table = list[SimpleNamespace]
"""Where each tensor of a bucket lies in its memory: name, shape, dtype, start_idx and end_idx in bytes, and numel, its bytes."""


class SharedBucket:
    """Tensors in one piece of shared memory.

    table  where they lie.
    data   flat uint8 memory of the tensors, on their device.

    A handle is the pickle that SGLang reads as `flattened_bucket`: a reference to the bytes and a table of the tensors in
    them. It uses only names that SGLang's unpickler admits, and making it needs only torch. One handle per bucket is enough;
    with one per tensor, torch would make and open hundreds of IPC events and counters.
    """

    def __init__(self, table: Table, memory: _HostMemory | _CudaMemory):
        self.table, self._memory = table, memory

    @classmethod
    def copy_of(
        cls, bucket: Bucket, used: SharedBucket | None = None, own: Container[torch.UntypedStorage] = ()
    ) -> SharedBucket:
        """Return a copy of a bucket's tensors, on the device of the first one. The bucket is emptied.

        used  a bucket that nobody reads any more. Its memory is used again if the size fits, and given back if not: on a CPU,
              new shared memory costs several times the copy.
        own   storages made by `shareable_bytes`. A contiguous tensor in one of them that is alone in its bucket is shared
              without a copy.
        """
        table, first = _table(bucket), bucket[0][1]
        if len(bucket) == 1 and first.untyped_storage() in own:
            if used is not None:
                used.close()
            shared = cls(table, _shared(first.view(-1).view(torch.uint8)))
        else:
            shared = cls.empty(table, first.device, used)
            for (_, tensor), place in zip(bucket, table):
                flat = shared.data[place.start_idx : place.end_idx]
                flat.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        bucket.clear()
        shared.wait()
        return shared

    @classmethod
    def empty(cls, table: Table, device: torch.device, used: SharedBucket | None = None) -> SharedBucket:
        """Return a bucket for the tensors of `table`, whose bytes are still to come. `used` is as in `copy_of`.

        Raise RolloutError if there is no room in /dev/shm.
        """
        return cls(table, _memory(table[-1].end_idx, device, used))

    @property
    def data(self) -> Tensor:
        return self._memory.data[: self.table[-1].end_idx]

    def wait(self) -> None:
        """Wait until all that the device was asked to do with the bytes is done."""
        if self.data.is_cuda:
            torch.cuda.current_stream(self.data.device).synchronize()

    def handle(self, num_openers: int = 1) -> str:
        """Return what up to `num_openers` processes need to open the bucket once each, in base64."""
        content = {"flattened_tensor": self._memory.opening(num_openers), "metadata": self.table}
        return base64.b64encode(pickle.dumps(content)).decode()

    def close(self) -> None:
        """Give the memory back. A process that has it open keeps it (CPU) or must not read it any more (GPU)."""
        self._memory.close()


class ReadBuckets:
    """The buckets of an update that servers may still read, oldest first."""

    def __init__(self) -> None:
        self._buckets: deque[SharedBucket] = deque()

    def add(self, new: Callable[[SharedBucket | None], SharedBucket], num_read: int) -> SharedBucket:
        """Return `new(used)`. `used` is a bucket that nobody reads any more if there are more than `num_read`, else None."""
        used = self._buckets.popleft() if len(self._buckets) > num_read else None
        self._buckets.append(new(used))
        return self._buckets[-1]

    def close(self) -> None:
        """Give all memory back."""
        while self._buckets:
            self._buckets.popleft().close()


def _table(bucket: Bucket) -> Table:
    table, end = [], 0
    for name, tensor in bucket:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + tensor.nbytes
        place = {"start_idx": start, "end_idx": end, "numel": tensor.nbytes}
        table.append(SimpleNamespace(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype, **place))
    return table


def shareable_bytes(num_bytes: int, device: torch.device) -> Tensor:
    """Return flat uninitialized uint8 memory. Others can open it once a SharedBucket has it; until then, dropping it frees it.

    Raise RolloutError if /dev/shm has no room for it.
    """
    if device.type != "cpu":
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    storage = torch.UntypedStorage._new_using_filename_cpu(num_bytes)
    _reserve(storage)
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _reserve(storage: torch.UntypedStorage) -> None:
    """Allocate the storage's pages now. Otherwise a full /dev/shm would kill this process by SIGBUS when it writes."""
    path = _path(storage)
    file = os.open(path, os.O_RDWR)
    try:
        os.posix_fallocate(file, 0, os.fstat(file).st_size)
    except OSError as error:
        free = shutil.disk_usage(_SHARED_MEMORY).free
        _delete_ourselves(storage)
        path.unlink()
        raise RolloutError(
            f"rollout.sglang.sync tensor needs {storage.nbytes() / _MIB:.0f} MiB of shared memory for a bucket, but "
            f"{_SHARED_MEMORY} has {free / _MIB:.0f} MiB free ({error.strerror}); enlarge it "
            "(docker run --shm-size), lower rollout.sglang.bucket_mib, or sync distributed"
        ) from error
    finally:
        os.close(file)


def _delete_ourselves(storage: torch.UntypedStorage) -> None:
    """Keep torch from deleting the storage's file, since we delete it ourselves.

    torch counts users in the file, and the last one deletes it. A server that dies is never counted out. We count one more
    user, so the count never gets to 0.
    """
    storage._shared_incref()


def _path(storage: torch.UntypedStorage) -> Path:
    _, name, _ = storage._share_filename_cpu_()
    return _SHARED_MEMORY / os.fsdecode(name).lstrip("/")


def _memory(num_bytes: int, device: torch.device, used: SharedBucket | None) -> _HostMemory | _CudaMemory:
    """Return the memory of `used` or new memory. The large memory of an embedding is not kept for ordinary buckets."""
    if used is not None:
        data = used._memory.data
        if data.device == device and num_bytes <= data.nbytes <= 2 * num_bytes:
            return used._memory
        used.close()
    return _shared(shareable_bytes(num_bytes, device))


def _shared(data: Tensor) -> _HostMemory | _CudaMemory:
    return _HostMemory(data) if data.device.type == "cpu" else _CudaMemory(data)


class _Call:
    """Pickles as a function call, which is made where it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


class _HostMemory:
    """Named shared memory, as of torch's `file_system` strategy, without choosing that strategy for this process.

    Its file is deleted when this object is closed or dropped. If the process is killed, torch's `torch_shm_manager` deletes
    it within seconds after the last server that had opened it has ended. If both are killed, the file stays.
    """

    def __init__(self, data: Tensor):
        self.data, self._storage = data, data.untyped_storage()
        self._manager, self._name, _ = self._storage._share_filename_cpu_()
        _delete_ourselves(self._storage)
        self._delete = weakref.finalize(self, _path(self._storage).unlink, missing_ok=True)

    def opening(self, num_openers: int) -> _Call:
        for _ in range(num_openers):
            self._storage._shared_incref()  # a process that opens it counts itself out once
        size = self._storage.nbytes()
        untyped = _Call(reductions.rebuild_storage_filename, torch.UntypedStorage, self._manager, self._name, size)
        storage = _Call(reductions.rebuild_typed_storage, untyped, torch.uint8)
        place = (self.data.storage_offset(), tuple(self.data.shape), (1,), False)
        return _Call(reductions.rebuild_tensor, Tensor, storage, place)

    def close(self) -> None:
        self._delete()
        del self.data, self._storage


class _CudaMemory:
    """Memory of torch's caching allocator, shared by CUDA IPC."""

    def __init__(self, data: Tensor):
        self.data = data
        # only once: each call adds a counter and an event to the memory
        rebuild, arguments = reductions.reduce_tensor(self.data)
        arguments = list(arguments)
        # torch frees the memory when its counter of openers is 0. An opener that dies never counts itself out, so we
        # count it out now. Others would then count below 0, a huge number for torch (uint64), and the memory would never
        # be freed. So they get the name of a counter that does not exist: torch ignores one that it cannot open.
        torch.UntypedStorage._release_ipc_counter_cuda(*arguments[_COUNTER])
        arguments[_COUNTER] = _NO_COUNTER
        # the opener may number its GPUs differently; SGLang finds a device by its UUID
        arguments[_DEVICE] = str(torch.cuda.get_device_properties(arguments[_DEVICE]).uuid)
        self._opening = _Call(rebuild, *arguments)

    def opening(self, num_openers: int) -> _Call:
        return self._opening

    def close(self) -> None:
        del self.data
