"""The walls around one call: a forked process passes through `enter` and then runs model-written code.

Change here: a wall, or a limit. Each wall alone stops some attacks of canary.py; a new wall needs an attack that shows it.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass

from dapo_mcore.tools.sandbox.inside import kernel, landlock, seccomp

HOME = "/tmp"
"""The only place that the code can write to: a file system in memory that ends with the call."""
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_NOBODY = 65534
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """What one call may use.

    memory_mib  address space, with Python and the loaded modules (about 300 MiB with numpy and sympy).
    disk_mib    files in /tmp. They lie in memory and count beside memory_mib.
    """

    cpu_s: int
    memory_mib: int
    disk_mib: int
    threads: int


def enter(limits: Limits, readable: Sequence[str], needs_landlock: bool) -> None:
    """Wall this process in, for good. It must be the first process of its PID namespace and have one thread.

    Raise OSError if a wall cannot be built: the process must then end. Afterwards it owns no capability, cannot start another
    process or program, open a socket, or write outside HOME.
    """
    kernel.unshare(kernel.CLONE_NEWNS)
    _mount_home(limits.disk_mib, [path for path in readable if path.startswith(HOME + "/") and os.path.isdir(path)])
    _become_nobody()
    kernel.unshare(kernel.CLONE_NEWUSER)  # the kernel counts threads per user and user namespace: this call's alone
    _limit(limits)
    kernel.keep_capabilities()
    kernel.forbid_new_privileges()
    if landlock.version():
        landlock.restrict(readable, (HOME, *DEVICES))
    elif needs_landlock:
        raise OSError("this kernel has no Landlock (Linux 5.13 or later, with landlock in CONFIG_LSM or lsm=)")
    seccomp.install()


def _mount_home(size_mib: int, within: Sequence[str]) -> None:
    """Mount an empty HOME, and in it again the folders that were there: Python itself may be installed below /tmp."""
    copies = {path: kernel.copy_mount(path) for path in within}
    options = f"size={size_mib}m,nr_inodes=4096,mode=1777"
    kernel.mount("tmpfs", HOME, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)
    for path, copy in copies.items():
        os.makedirs(path, exist_ok=True)  # one may contain another
        kernel.attach_mount(copy, path)
    os.chdir(HOME)


def _become_nobody() -> None:
    """Give up root: its files, and its exemption from the limit of threads."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)


def _limit(limits: Limits) -> None:
    for kind, most in {
        resource.RLIMIT_CPU: limits.cpu_s,
        resource.RLIMIT_AS: limits.memory_mib * _MIB,
        resource.RLIMIT_FSIZE: limits.disk_mib * _MIB,
        resource.RLIMIT_NPROC: limits.threads,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 256,
    }.items():
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
