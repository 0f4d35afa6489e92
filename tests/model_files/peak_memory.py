"""The peak memory of a block of code in this process, as the kernel counts it."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

_LIBC = ctypes.CDLL(None)
_M_MMAP_THRESHOLD = -3


def give_freed_memory_back() -> None:
    """Make glibc return freed blocks of 64 KiB or more to the kernel, so that resident memory is memory in use."""
    assert _LIBC.mallopt(_M_MMAP_THRESHOLD, 1 << 16)


class PeakMemory:
    """After the block, `peak_bytes` is the largest rise of resident memory inside it."""

    peak_bytes = 0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        _LIBC.malloc_trim(0)  # freed memory that glibc keeps would hide what is allocated from it
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
        self._before = _status("VmHWM")
        return self

    def __exit__(self, *_: Any) -> None:
        self.peak_bytes = _status("VmHWM") - self._before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
