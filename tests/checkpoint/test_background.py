"""The memory that a rank shares with the process that writes its shards. The process: test_saver.py."""

from __future__ import annotations

import errno
import mmap
import os

import pytest

from dapo_mcore.checkpoint.background import SharedMemory
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
