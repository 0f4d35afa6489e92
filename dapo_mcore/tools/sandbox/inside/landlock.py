"""Landlock: a process gives up files, TCP ports and signals to processes outside its own domain. Linux 5.13, no root needed.

Change here: a new right of a newer kernel (include/uapi/linux/landlock.h).
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable

from dapo_mcore.tools.sandbox.inside import kernel

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture
_VERSION, _PATH_BENEATH = 1, 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_FOLDER, _TRUNCATE = 1, 2, 4, 8, 1 << 14
_IOCTL_DEVICE = 1 << 15
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEVICE
_READ = _EXECUTE | _READ_FILE | _READ_FOLDER
_FILE_RIGHTS_OF_VERSION = {1: 1 << 13, 2: 1 << 14, 3: 1 << 15, 4: 1 << 15, 5: 1 << 16}
"""One above the last right on files that a version knows. Later versions add none."""
_TCP_BIND_AND_CONNECT = 3
_SOCKETS_AND_SIGNALS = 3


def version() -> int:
    """Return the version of Landlock in this kernel, 0 if there is none."""
    try:
        return kernel.syscall(_CREATE_RULESET, None, 0, _VERSION)
    except OSError:
        return 0


def restrict(readable: Iterable[str], writable: Iterable[str]) -> None:
    """Leave this process only the named files and folders. Readable paths that do not exist are left out.

    From version 4 on it also loses TCP, from 6 on signals and abstract sockets of other processes. The process must have
    forbidden new privileges.
    """
    handled, known = _handled(version())
    ruleset = kernel.syscall(_CREATE_RULESET, handled, len(handled), 0)
    try:
        for path in readable:
            if os.path.exists(path):
                _allow(ruleset, path, _READ & known)
        for path in writable:
            _allow(ruleset, path, known)
        kernel.syscall(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _handled(abi: int) -> tuple[bytes, int]:
    """Return the kernel's structure of everything that is forbidden unless allowed, and its rights on files."""
    files = _FILE_RIGHTS_OF_VERSION.get(abi, _FILE_RIGHTS_OF_VERSION[5]) - 1
    fields = [files] + [_TCP_BIND_AND_CONNECT] * (abi >= 4) + [_SOCKETS_AND_SIGNALS] * (abi >= 6)
    return struct.pack(f"={len(fields)}Q", *fields), files


def _allow(ruleset: int, path: str, rights: int) -> None:
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(place).st_mode):
            rights &= _FILE_RIGHTS
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, place), 12)
        kernel.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
    finally:
        os.close(place)
