"""How much memory of this process a block of code needs at most, as the kernel counts it."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

_LIBC = ctypes.CDLL(None)
_M_MMAP_THRESHOLD = -3


def give_freed_memory_back() -> None:
    """From now on glibc returns every block from 64 KiB up to the kernel when it is freed; resident memory is what lives."""
    assert _LIBC.mallopt(_M_MMAP_THRESHOLD, 1 << 16)


class PeakMemory:
    """After the block, `peak_bytes` is what resident memory rose by at its highest point."""

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
