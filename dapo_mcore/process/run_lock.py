"""One live run per folder: rank 0 holds runs/NAME/.lock from before anything in the folder is touched until the end.

Change here: how a live run is told from a dead one.

On one machine the kernel decides: the file is locked (fcntl), and such a lock ends with its process, however that dies.
Many network file systems pass the lock on to other machines, but not all do. So between machines the file's age decides as
well: while a run lives it touches its lock every BEAT_S. A lock that the kernel gives, but whose file another machine has
touched within STALE_S, is refused. Slurm ends a job before it starts it again, so a lock of the same job with another
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
BEAT_S = 20.0
STALE_S = 120.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class RunLock:
    """The lock of a run's folder, which it makes where there is none. `release` also removes a folder that is empty then.

    Raises ConfigError while another run holds it, with who and since when; OSError where the folder cannot be written.
    """

    def __init__(self, run_dir: Path):
        self._path = run_dir / LOCK
        self._made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            self._file = _open_locked(self._path)
        except BaseException:
            self._remove_empty()
            raise
        self._released = threading.Event()
        threading.Thread(target=self._beat, name="run-lock", daemon=True).start()

    def release(self) -> None:
        """Give the folder free. May be called twice."""
        if self._released.is_set():
            return
        self._released.set()
        with suppress(OSError):
            self._path.unlink()
        os.close(self._file)
        self._remove_empty()

    def _beat(self) -> None:
        while not self._released.wait(BEAT_S):
            with suppress(OSError):
                os.utime(self._path)

    def _remove_empty(self) -> None:
        with suppress(OSError):  # the first that is not empty ends it
            for folder in self._made:
                folder.rmdir()


def _open_locked(path: Path) -> int:
    """Return the descriptor of the locked file, with this process's record in it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            is_free = _try_lock(file)
            holder, age = _read(file), time.time() - os.fstat(file).st_mtime
            if is_free is False or (age < STALE_S and _may_live(holder, asked=is_free is not None)):
                raise ConfigError(_refusal(path, holder, age))
            if _is_same_file(path, file):  # else a run has ended in between and removed the file
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
    """What tells machines apart; containers of one machine have names of their own and its kernel's locks."""
    with suppress(OSError):
        return _BOOT_ID.read_text(encoding="ascii").strip()
    return socket.gethostname()


def _may_live(holder: Mapping[str, Any], *, asked: bool) -> bool:
    """Return whether the holder may live although it does not hold the kernel's lock; `asked`: this machine's has been asked."""
    own = _own_record()
    is_restart = own["job"] is not None and holder.get("job") == own["job"] and holder.get("restart") != own["restart"]
    is_here = holder.get("boot") == own["boot"]
    return bool(holder) and not is_restart and not (asked and is_here)


def _refusal(path: Path, holder: Mapping[str, Any], age: float) -> str:
    job = f", job {holder['job']}" if holder.get("job") else ""
    who = (
        f"process {holder.get('pid')} on {holder.get('host')}{job}, since {holder.get('since')}"
        if holder
        else "a process"
    )
    told = f"another run lives in {path.parent}: {who}, and gave its last sign of life {max(age, 0):.0f} s ago; "
    remedy = "wait for its end, end it, or give this run another name (name=…)"
    if holder and holder.get("boot") != _boot_id():
        remedy += f"; if it is dead, try again in {STALE_S:.0f} s, or delete {path}"
    return told + remedy


def _read(file: int) -> dict[str, Any]:
    """Return the record in the file, {} where there is none. By its descriptor: closing another one would end our lock."""
    with suppress(ValueError):
        record = json.loads(os.pread(file, 4096, 0))
        return record if isinstance(record, dict) else {}
    return {}


def _is_same_file(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False
