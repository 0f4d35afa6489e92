"""Durable writes: bytes that must survive a crash of the machine.

Change here: how a file or a folder reaches the disk.
"""

from __future__ import annotations

import os
from pathlib import Path


def sync_to_disk(path: Path) -> None:
    """Wait until a closed file's bytes, or a folder's entries, are on disk. Call it before a rename that publishes them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
