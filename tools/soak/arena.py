"""A small disk and a /dev/shm that are the soak's own: file systems in memory, in a mount namespace of their own.

Change here: how the soak gets a disk that it can fill. Root needs nothing else; other users need user namespaces, which many
systems allow. Both end with the last process of the soak, so nothing has to be unmounted.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_INSIDE = "DAPO_MCORE_SOAK_ARENA"
_MOUNT = ("mount", "-t", "tmpfs")
DISK_MIB = 64


def enter(module: str, arguments: list[str]) -> str:
    """Start this program again in its own mount namespace, in place of this process. Return in words which one, once inside, or
    why there is none: the soak then has no small disk."""
    if inside := os.environ.get(_INSIDE):
        return inside
    unshare = ["unshare", "--mount", *(() if os.geteuid() == 0 else ("--user", "--map-root-user"))]
    reason = _refusal([*unshare, *_MOUNT, "none", "/dev/shm"])
    words = f"a tmpfs of {DISK_MIB} MiB, {'as root' if os.geteuid() == 0 else 'in a user namespace'}"
    os.environ[_INSIDE] = words if reason is None else f"none: {reason}"
    if reason is None:
        os.execvp(unshare[0], [*unshare, sys.executable, "-m", module, *arguments])
    return os.environ[_INSIDE]


def has_disk(words: str) -> bool:
    return not words.startswith("none")


def mount(disk: Path) -> None:
    """Put an empty small disk at `disk`, and an empty /dev/shm."""
    disk.mkdir(parents=True, exist_ok=True)
    subprocess.run([*_MOUNT, "-o", f"size={DISK_MIB}m", "none", str(disk)], check=True)
    subprocess.run([*_MOUNT, "none", "/dev/shm"], check=True)


def fill(disk: Path, leave: int) -> None:
    """Fill the disk up to `leave` bytes."""
    with (disk / "filler").open("wb") as file:
        space = os.statvfs(disk)
        os.posix_fallocate(file.fileno(), 0, max(1, space.f_bavail * space.f_frsize - leave))


def free(disk: Path) -> None:
    (disk / "filler").unlink(missing_ok=True)


def _refusal(command: list[str]) -> str | None:
    """Return why the command fails, None if it does not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return None if done.returncode == 0 else done.stderr.strip() or f"{command[0]} ended with {done.returncode}"
