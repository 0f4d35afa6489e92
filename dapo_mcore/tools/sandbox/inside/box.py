"""Builds a box with namespaces alone, where bubblewrap is missing or fails, and serves calls in it.

Change here: what a box without bubblewrap sees. `mechanisms.py` outside has the same for bubblewrap.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Any

from dapo_mcore.tools.sandbox.inside import cell, kernel, landlock, template

_NAMESPACES = kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
_NEW_ROOT = "/tmp"


def main(settings: dict[str, Any]) -> None:
    """Move into a box and serve calls until standard input closes. Raise OSError if the kernel refuses a wall."""
    if not landlock.version():
        raise OSError("this kernel has no Landlock (Linux 5.13 or later, with landlock in CONFIG_LSM or lsm=)")
    _unshare()
    _mount_view(settings["readable"])
    child = os.fork()
    if child:  # the child is the first process of its namespace
        os.close(0)
        os.close(1)
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    kernel.die_with_parent()
    kernel.keep_capabilities(kernel.CAP_SYS_ADMIN, kernel.CAP_SETUID, kernel.CAP_SETGID, kernel.CAP_KILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    template.serve(settings)


def _unshare() -> None:
    """Enter new namespaces: as root at once, else in a user namespace that has this user only."""
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        kernel.unshare(_NAMESPACES)
        return
    kernel.unshare(_NAMESPACES | kernel.CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _mount_view(readable: Sequence[str]) -> None:
    """Make a root that has only the readable paths and three devices, all read-only, and an empty /tmp."""
    kernel.mount(None, "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    links = {path: os.readlink(path) for path in readable if os.path.islink(path)}
    seen = [path for path in (*readable, *cell.DEVICES) if path not in links and os.path.exists(path)]
    copies = {path: (kernel.copy_mount(path), os.path.isdir(path)) for path in seen}  # the new root may hide some
    kernel.mount("tmpfs", _NEW_ROOT, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=1m,mode=755")
    os.makedirs(_NEW_ROOT + cell.HOME)
    for path, target in links.items():
        os.makedirs(os.path.dirname(_NEW_ROOT + path), exist_ok=True)
        os.symlink(target, _NEW_ROOT + path)
    for path, (copy, is_folder) in copies.items():
        kernel.attach_mount(copy, _placeholder(_NEW_ROOT + path, is_folder))
    kernel.change_root(_NEW_ROOT)
    kernel.make_read_only("/")


def _placeholder(path: str, is_folder: bool) -> str:
    """Return the path, at which there is now an empty folder or file to mount something on."""
    os.makedirs(path if is_folder else os.path.dirname(path), exist_ok=True)
    if not is_folder:
        os.close(os.open(path, os.O_CREAT | os.O_CLOEXEC, 0o644))
    return path
