"""A bucket of weights in one piece of memory that other processes of this machine open by a handle: CUDA IPC on a GPU,
POSIX shared memory on a CPU.

Change here: how memory is shared, and what a handle says. When a bucket may go is tensor.py's.
"""

from __future__ import annotations

import base64
import os
import pickle
import shutil
import weakref
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
# among the arguments of rebuild_cuda_tensor; SGLang's utils/patch_torch.py counts on the first, too
_DEVICE, _COUNTER = 6, slice(11, 13)
_NO_COUNTER = (b"/dapo_mcore_counts_no_openers", 0)


class SharedBucket:
    """A copy of a bucket's tensors, on the first one's device; the bucket is emptied.

    used  a bucket that nobody reads any more: its memory is taken where it fits, given back where it does not. On a
          CPU, new shared memory costs several times the copy.
    own   storages from `shareable_bytes`: a contiguous tensor that lies in one and is alone in its bucket is shared as it
          is.

    A handle is the pickle that SGLang reads as `flattened_bucket`: a reference to the bytes and a table of the tensors
    in them, built from names that SGLang's unpickler admits. The sender needs torch alone. With a handle for each
    tensor instead, torch would make and open hundreds of IPC events and counters.
    """

    def __init__(self, bucket: Bucket, used: SharedBucket | None = None, own: Container[torch.UntypedStorage] = ()):
        self._table, end = [], 0
        for name, tensor in bucket:
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = start + tensor.nbytes
            place = {"start_idx": start, "end_idx": end, "numel": tensor.nbytes}
            self._table.append(SimpleNamespace(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype, **place))
        first = bucket[0][1]
        if len(bucket) == 1 and first.untyped_storage() in own:
            if used is not None:
                used.close()
            self._memory = _shared(first.view(-1).view(torch.uint8))
        else:
            self._memory = _memory(end, first.device, used)
            for (_, tensor), place in zip(bucket, self._table):
                flat = self._memory.data[place.start_idx : place.end_idx]
                flat.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        bucket.clear()
        if self._memory.data.is_cuda:
            torch.cuda.current_stream(self._memory.data.device).synchronize()

    def handle(self) -> str:
        """What one process needs to open the bucket once, in base64."""
        content = {"flattened_tensor": self._memory.opening(), "metadata": self._table}
        return base64.b64encode(pickle.dumps(content)).decode()

    def close(self) -> None:
        """Gives the memory back; a process that has it open keeps it (CPU) or must not read it any more (GPU)."""
        self._memory.close()


def shareable_bytes(num_bytes: int, device: torch.device) -> Tensor:
    """Flat uint8 memory, uninitialized, that others can open once a SharedBucket has it; dropped before, it is gone.

    Raises RolloutError where /dev/shm has no room for it.
    """
    if device.type != "cpu":
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    storage = torch.UntypedStorage._new_using_filename_cpu(num_bytes)
    _reserve(storage)
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _reserve(storage: torch.UntypedStorage) -> None:
    """Otherwise a full /dev/shm would kill this process by SIGBUS as it writes."""
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
    """torch counts users in the file and lets the last one delete it. A server that dies is never counted out, so we
    delete it; counted in once more, nobody else does."""
    storage._shared_incref()


def _path(storage: torch.UntypedStorage) -> Path:
    _, name, _ = storage._share_filename_cpu_()
    return _SHARED_MEMORY / os.fsdecode(name).lstrip("/")


def _memory(num_bytes: int, device: torch.device, used: SharedBucket | None) -> _HostMemory | _CudaMemory:
    """That of `used`, or new; an embedding's is not kept for ordinary buckets."""
    if used is not None:
        data = used._memory.data
        if data.device == device and num_bytes <= data.nbytes <= 2 * num_bytes:
            return used._memory
        used.close()
    return _shared(shareable_bytes(num_bytes, device))


def _shared(data: Tensor) -> _HostMemory | _CudaMemory:
    return _HostMemory(data) if data.device.type == "cpu" else _CudaMemory(data)


class _Call:
    """Pickles as the call of a function, which happens where it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


class _HostMemory:
    """Named shared memory, opened by the way that torch calls `file_system`, without choosing it for this process.

    Its file goes when this is closed, or let go. Where the process is killed, torch's `torch_shm_manager` deletes it
    within seconds after the last server that had opened it has ended, too; what kills both leaves the file.
    """

    def __init__(self, data: Tensor):
        self.data, self._storage = data, data.untyped_storage()
        self._manager, self._name, _ = self._storage._share_filename_cpu_()
        _delete_ourselves(self._storage)
        self._delete = weakref.finalize(self, _path(self._storage).unlink, missing_ok=True)

    def opening(self) -> _Call:
        self._storage._shared_incref()  # whoever opens it takes one off
        size = self._storage.nbytes()
        untyped = _Call(reductions.rebuild_storage_filename, torch.UntypedStorage, self._manager, self._name, size)
        storage = _Call(reductions.rebuild_typed_storage, untyped, torch.uint8)
        place = (self.data.storage_offset(), tuple(self.data.shape), (1,), False)
        return _Call(reductions.rebuild_tensor, Tensor, storage, place)

    def close(self) -> None:
        self._delete()
        del self.data, self._storage


class _CudaMemory:
    """Memory of the caching allocator, shared by CUDA IPC."""

    def __init__(self, data: Tensor):
        self.data = data
        # once: torch chains a counter to the memory each time, and an event
        rebuild, arguments = reductions.reduce_tensor(self.data)
        arguments = list(arguments)
        # torch frees the memory when its counter of openers is 0. An opener that dies never counts itself out, so we
        # count it out now. Others would then count below 0, which is a huge number to torch (uint64), and the memory
        # would stay for ever: they get the name of no counter, and torch passes over one that it cannot open.
        torch.UntypedStorage._release_ipc_counter_cuda(*arguments[_COUNTER])
        arguments[_COUNTER] = _NO_COUNTER
        # the opener may number its GPUs in another way; SGLang finds a device by its UUID
        arguments[_DEVICE] = str(torch.cuda.get_device_properties(arguments[_DEVICE]).uuid)
        self._opening = _Call(rebuild, *arguments)

    def opening(self) -> _Call:
        return self._opening

    def close(self) -> None:
        del self.data
