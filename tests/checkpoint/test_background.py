"""The memory that a rank shares with the process that writes its shards. The process: test_saver.py."""

from __future__ import annotations

import errno
import mmap
import os

import pytest
import torch

from dapo_mcore.actor.checkpoint_blocks import CheckpointBlock
from dapo_mcore.checkpoint.background import SharedMemory
from dapo_mcore.checkpoint.snapshot import Snapshot
from dapo_mcore.errors import ResourceError


def test_another_map_of_the_descriptor_sees_the_bytes_and_closing_frees_it() -> None:
    memory = SharedMemory(5000)
    memory.bytes[4999] = 7
    with mmap.mmap(memory.descriptor, 0, prot=mmap.PROT_READ) as other:
        assert (len(other), other[4999], other[0]) == (5000, 7, 0)
    descriptor = memory.descriptor
    memory.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_too_little_memory_is_an_error_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not a bus error when the memory is first written."""

    def refuse(*_: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    told = r"4\.0 GiB, does not fit into host memory \(Cannot allocate memory\); set checkpoint\.async_save false"
    with pytest.raises(ResourceError, match=told):
        SharedMemory(4 << 30)


def test_on_a_gpu_machine_the_memory_is_pinned_and_the_copy_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only calls and their order: the functions of CUDA are fake."""
    calls: list[str] = []

    class Runtime:
        def cudaHostRegister(self, pointer: int, num_bytes: int, flags: int) -> int:
            calls.append(f"pin {num_bytes}")
            return 0

        def cudaHostUnregister(self, pointer: int) -> int:
            calls.append("unpin")
            return 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    whole = torch.arange(8.0)
    snapshot = Snapshot([CheckpointBlock("w", (8,), (0,), whole, is_written=True, is_padded=False)])
    memory = SharedMemory(snapshot.num_bytes)
    assert memory.is_pinned
    snapshot.copy_to(memory.bytes, non_blocking=memory.is_pinned)
    assert calls == [f"pin {snapshot.num_bytes}", "wait"]
    assert torch.equal(memory.bytes[len(snapshot.header) :].clone().view(torch.float32), whole)
    memory.close()
    assert calls[2:] == ["unpin"]
