"""A rank's beacon: what it is doing, in a small file in memory that another process reads even if the rank hangs.

Change here: what a rank says of itself. hang.py judges it.

A note is a copy of 100 bytes into mapped memory: no system call, and the reader needs nothing from the rank, not even the GIL.
"""

from __future__ import annotations

import faulthandler
import fcntl
import mmap
import os
import shutil
import signal
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

_VERSION, _NOTE = struct.Struct("<Q"), struct.Struct("<IIQQd32s32s")
"""The version is odd while the note changes."""
_ERROR_FILE_AT, _SIZE = 256, 4096
_READS = 100
_ALIVE = ".alive"
"""A file that is locked as long as its rank lives. Process ids do not tell: containers may share a folder, but not their numbers."""
DUMP = signal.SIGUSR1
"""A rank that gets it writes the stacks of its threads into its stack file. faulthandler does that in C, without the GIL."""


class Note(NamedTuple):
    """What a rank says of itself.

    phase       phase of the run: train, save, …; empty between them, "left" at the end.
    waits_for   the control collective in which the rank waits; empty while it works.
    num_waits   control collectives that it has begun. All ranks take part in all of them, in the same order.
    ticks       signs of progress: micro-batches, finished responses.
    since       time.monotonic() of the last note; every note has another one.
    """

    pid: int
    rank: int
    num_waits: int
    ticks: int
    since: float
    phase: str
    waits_for: str


class NullBeacon:
    """The interface of Beacon, for jobs that nobody watches."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Say that the block is the phase `name`."""
        yield

    @contextmanager
    def waits(self, collective: str) -> Iterator[None]:
        """Say that the block waits for all other ranks."""
        yield

    def tick(self) -> None:
        """Say that the work goes on. May be called in any thread."""

    def leave(self) -> None:
        """Say that this rank ends as it should."""


class Beacon(NullBeacon):
    """The beacon of this process in `folder`, which is the node's and this attempt's own."""

    def __init__(self, folder: Path, rank: int, error_file: str = ""):
        """error_file  where torchrun looks for this rank's last words."""
        partial = folder / f"{rank}.partial"
        with partial.open("w+b") as file:
            file.truncate(_SIZE)
            self._memory = mmap.mmap(file.fileno(), _SIZE)
        words = os.fsencode(error_file)
        self._memory[_ERROR_FILE_AT : _ERROR_FILE_AT + len(words)] = words
        self._note = Note(os.getpid(), rank, 0, 0, 0.0, "", "")
        self._lock, self._version = threading.Lock(), 0
        self._write()
        self._stacks = stack_file(folder, rank).open("wb")  # stays open: nothing can be opened in a signal's handler
        self._alive = (folder / f"{rank}{_ALIVE}").open("wb")
        with suppress(OSError):  # a file system without locks
            fcntl.flock(self._alive, fcntl.LOCK_EX)  # until the process ends, however it does
        faulthandler.register(DUMP, self._stacks, all_threads=True, chain=False)
        partial.rename(folder / f"{rank}.beacon")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before = self._note.phase
        self._write(phase=name)
        try:
            yield
        finally:
            self._write(phase=before)

    @contextmanager
    def waits(self, collective: str) -> Iterator[None]:
        self._write(waits_for=collective, num_waits=self._note.num_waits + 1)
        try:
            yield
        finally:
            self._write(waits_for="")

    def tick(self) -> None:
        self._write(ticks=self._note.ticks + 1)

    def leave(self) -> None:
        self._write(phase="left")

    def _write(self, **changes: int | str) -> None:
        with self._lock:
            self._note = note = self._note._replace(since=time.monotonic(), **changes)
            self._version += 2
            _VERSION.pack_into(self._memory, 0, self._version - 1)
            _NOTE.pack_into(self._memory, _VERSION.size, *note[:5], note.phase.encode(), note.waits_for.encode())
            _VERSION.pack_into(self._memory, 0, self._version)


class BeaconReader:
    """Reads the beacons of a folder from another process. Files stay open: a cleaner of old files may delete them."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._files: dict[Path, BinaryIO] = {}

    def read(self) -> list[Note]:
        """Return the notes of all ranks, in rank order; none of a rank that was killed while it wrote."""
        for path in self._folder.glob("*.beacon"):
            if path not in self._files:
                self._files[path] = path.open("rb")
        notes = [_read(file.fileno()) for file in self._files.values()]
        return sorted((note for note in notes if note is not None), key=lambda note: note.rank)


def remove_dead(folders: Iterable[Path]) -> None:
    """Delete the folders whose ranks have all ended: their watchdog was killed, too, or it would have deleted them."""
    for folder in folders:
        with suppress(OSError), ExitStack() as files:  # of another user, or a rank is alive
            locks = [files.enter_context(path.open("rb")) for path in folder.glob(f"*{_ALIVE}")]
            for lock in locks:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if locks:
                shutil.rmtree(folder)


def error_file_of(folder: Path, rank: int) -> str:
    """Return where torchrun looks for the rank's last words; empty if torchrun has not started it."""
    content = (folder / f"{rank}.beacon").read_bytes()
    return os.fsdecode(content[_ERROR_FILE_AT:].rstrip(b"\0"))


def stack_file(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.stacks"


def _read(file: int) -> Note | None:
    """Return the note in the file; None if it is half written at each of many looks."""
    for _ in range(_READS):
        content = os.pread(file, _VERSION.size + _NOTE.size, 0)
        (version,) = _VERSION.unpack_from(content)
        if version % 2 == 0 and os.pread(file, _VERSION.size, 0) == content[: _VERSION.size]:
            *numbers, phase, waits_for = _NOTE.unpack_from(content, _VERSION.size)
            return Note(*numbers, phase.rstrip(b"\0").decode(), waits_for.rstrip(b"\0").decode())
    return None
