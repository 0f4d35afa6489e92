"""One live run per folder: rank 0 holds runs/NAME/.lock before it touches anything in the folder, and until the run ends.

Change here: how a live run differs from a dead one.

On one machine the kernel decides: the file is locked (fcntl), and the lock ends with its process, however the process dies.
Many network file systems share such locks between machines, but not all do. Between machines the age of the file therefore
decides as well: a live run touches its lock every HEARTBEAT_S. If the kernel grants the lock but another machine has touched
the file within STALE_S, the lock is refused. Slurm ends a job before it restarts it, so a lock of the same job with another
restart count is stale at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dapo_mcore.errors import ConfigError

LOCK = ".lock"
HEARTBEAT_S = 20.0
STALE_S = 120.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class RunLock:
    """The lock of a run's folder. It makes the folder if needed; `release` removes folders that it made and that are empty.

    Raise ConfigError while another run holds the lock, with its process, machine and start; OSError if the folder cannot be
    written.
    """

    def __init__(self, run_dir: Path):
        self._path = run_dir / LOCK
        self._made_folders = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            self._file = _open_locked(self._path)
        except BaseException:
            self._remove_empty()
            raise
        self._released = threading.Event()
        threading.Thread(target=self._send_heartbeats, name="run-lock", daemon=True).start()

    def release(self) -> None:
        """Release the folder. May be called twice."""
        if self._released.is_set():
            return
        self._released.set()
        with suppress(OSError):
            self._path.unlink()
        os.close(self._file)
        self._remove_empty()

    def _send_heartbeats(self) -> None:
        while not self._released.wait(HEARTBEAT_S):
            with suppress(OSError):
                os.utime(self._path)

    def _remove_empty(self) -> None:
        with suppress(OSError):  # stop at the first folder that is not empty
            for folder in self._made_folders:
                folder.rmdir()


def _open_locked(path: Path) -> int:
    """Lock the file, write this process's record into it and return its descriptor."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            is_free = _try_lock(file)
            holder, age = _read(file), time.time() - os.fstat(file).st_mtime
            if is_free is False or (age < STALE_S and _may_live(holder, kernel_asked=is_free is not None)):
                raise ConfigError(_refusal(path, holder, age))
            if _is_same_file(path, file):  # otherwise another run has ended meanwhile and removed the file
                os.ftruncate(file, 0)
                os.pwrite(file, json.dumps(_own_record()).encode(), 0)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _try_lock(file: int) -> bool | None:
    """Return whether the kernel gives this process the lock; None on a file system without locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def _own_record() -> dict[str, Any]:
    job = {"job": os.environ.get("SLURM_JOB_ID"), "restart": os.environ.get("SLURM_RESTART_COUNT", "0")}
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"host": socket.gethostname(), "boot": _boot_id(), "pid": os.getpid(), "since": since, **job}


def _boot_id() -> str:
    """Return an id of the machine. Host names do not do: containers of one machine have different names and share its locks."""
    with suppress(OSError):
        return _BOOT_ID.read_text(encoding="ascii").strip()
    return socket.gethostname()


def _may_live(holder: Mapping[str, Any], *, kernel_asked: bool) -> bool:
    """Return True if the holder may be alive although the kernel did not refuse the lock.

    kernel_asked  False on a file system without locks, where nothing is known about a process of this machine either.
    """
    own = _own_record()
    is_restart = own["job"] is not None and holder.get("job") == own["job"] and holder.get("restart") != own["restart"]
    is_here = holder.get("boot") == own["boot"]
    return bool(holder) and not is_restart and not (kernel_asked and is_here)


def _refusal(path: Path, holder: Mapping[str, Any], age: float) -> str:
    job = f", job {holder['job']}" if holder.get("job") else ""
    process = (
        f"process {holder.get('pid')} on {holder.get('host')}{job}, since {holder.get('since')}"
        if holder
        else "a process"
    )
    problem = f"another run is using {path.parent}: {process}, last sign of life {max(age, 0):.0f} s ago; "
    remedy = "wait for its end, end it, or give this run another name (name=…)"
    if holder and holder.get("boot") != _boot_id():
        remedy += f"; if it is dead, try again in {STALE_S:.0f} s, or delete {path}"
    return problem + remedy


def _read(file: int) -> dict[str, Any]:
    """Return the record in the file, or {}. Read by descriptor: closing another descriptor of the file would end our lock."""
    with suppress(ValueError):
        record = json.loads(os.pread(file, 4096, 0))
        return record if isinstance(record, dict) else {}
    return {}


def _is_same_file(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False
