"""System calls that Python's standard library lacks before 3.12: namespaces, mounts, capabilities.

Change here: another system call. Each function raises OSError with the kernel's answer.
"""

from __future__ import annotations

import ctypes
import os
import signal

CLONE_NEWNS = 0x0002_0000
CLONE_NEWUTS = 0x0400_0000
CLONE_NEWIPC = 0x0800_0000
CLONE_NEWUSER = 0x1000_0000
CLONE_NEWPID = 0x2000_0000
CLONE_NEWNET = 0x4000_0000

MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x4000, 0x4_0000
MNT_DETACH = 2

CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SYS_ADMIN = 5, 6, 7, 21

_OPEN_TREE, _MOVE_MOUNT, _PIDFD_OPEN, _MOUNT_SETATTR = 428, 429, 434, 442  # the same numbers on every architecture
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC, _MOVE_FROM_FD = 1, 0o2000000, 4
_READ_ONLY_NO_SUID = 0x1 | 0x2
_PR_SET_NO_NEW_PRIVS, _PR_SET_PDEATHSIG = 38, 1
_CAPABILITIES_V3 = 0x2008_0522

_LIBC = ctypes.CDLL(None, use_errno=True)


def syscall(number: int, *arguments: object) -> int:
    """Return the result of a system call by its number."""
    return _checked(_LIBC.syscall(ctypes.c_long(number), *arguments), f"system call {number}")


def unshare(flags: int) -> None:
    """Move this process, or with CLONE_NEWPID its next child, into new namespaces."""
    _checked(_LIBC.unshare(flags), "unshare")


def open_process(pid: int) -> int:
    """Return a pidfd. It becomes readable when the process ends."""
    return syscall(_PIDFD_OPEN, pid, 0)


def enter_namespace(fd: int, kind: int) -> None:
    """Move this process, or with CLONE_NEWPID its next child, into the namespace of the process or file `fd`."""
    _checked(_LIBC.setns(fd, kind), "setns")


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """Mount a file system, bind a path, or change how mounts spread."""
    texts = [None if text is None else text.encode() for text in (source, target, kind)]
    _checked(_LIBC.mount(*texts, ctypes.c_ulong(flags), options.encode() if options else None), f"mount {target}")


def copy_mount(path: str) -> int:
    """Return a file descriptor of a copy of the mounts at a path, which `attach_mount` puts somewhere."""
    flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | _AT_RECURSIVE
    return syscall(_OPEN_TREE, _AT_FDCWD, path.encode(), flags)


def attach_mount(copy: int, target: str) -> None:
    """Mount a copy at an existing file or folder, and close the copy."""
    syscall(_MOVE_MOUNT, copy, b"", _AT_FDCWD, target.encode(), _MOVE_FROM_FD)
    os.close(copy)


def make_read_only(target: str) -> None:
    """Make a mount and those below it read-only and ignore set-user-id bits. Needs Linux 5.12."""
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY_NO_SUID, 0, 0, 0)
    syscall(_MOUNT_SETATTR, _AT_FDCWD, target.encode(), _AT_RECURSIVE, attributes, ctypes.sizeof(attributes))


def change_root(new_root: str) -> None:
    """Make `new_root`, a mount, the root of this mount namespace, and detach the old one."""
    os.chdir(new_root)
    syscall({"x86_64": 155, "aarch64": 41}[os.uname().machine], b".", b".")  # pivot_root stacks the old root on the new
    _checked(_LIBC.umount2(b".", MNT_DETACH), "umount the old root")
    os.chdir("/")


def keep_capabilities(*kept: int) -> None:
    """Drop all capabilities of this process but `kept`. Without no_new_privs, starting a program may bring others back."""
    mask = sum(1 << capability for capability in kept)
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_V3, 0)
    low, high = mask & 0xFFFF_FFFF, mask >> 32
    _checked(_LIBC.capset(header, (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)), "capset")


def forbid_new_privileges() -> None:
    """Let no program that this process starts gain privileges. Landlock and seccomp require it."""
    prctl(_PR_SET_NO_NEW_PRIVS, 1)


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends."""
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def prctl(option: int, *arguments: object) -> None:
    """Change a property of this process."""
    padded = (*arguments, *[0] * (4 - len(arguments)))
    _checked(_LIBC.prctl(option, *[ctypes.c_ulong(a) if isinstance(a, int) else a for a in padded]), f"prctl {option}")


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result
