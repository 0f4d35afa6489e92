"""Save step 2 beside step 1 again and again. The n-th time, one process dies at its n-th file operation.

    python -m tests.checkpoint.killing FOLDER

The victim is a rank that saves at once, or the process of rank 0 or of rank 1 of a save beside training. Prints as JSON for each
victim the names of the operations at which it died.
"""

from __future__ import annotations

import builtins
import io
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dapo_mcore.actor.checkpoint_blocks import CheckpointBlock
from dapo_mcore.checkpoint import background, saver
from dapo_mcore.checkpoint.background import SaverProcess
from dapo_mcore.checkpoint.publish import Publication
from dapo_mcore.checkpoint.snapshot import Snapshot
from tests.checkpoint.stored_checkpoint import begin, write_checkpoint

OPERATIONS = ("fsync", "fdatasync", "rename", "replace", "mkdir", "unlink", "rmdir", "posix_fadvise")


def die_at(number: int, note: Path) -> None:
    """Make this process die at its file operation `number` from here on, and `note` that operation's name."""
    left = iter(range(number))

    def dying(name: str, function: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            if next(left, None) is None:
                with opened(note, "w") as file:
                    file.write(name)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **more)

        return call

    opened = io.open
    io.open = builtins.open = dying("open", opened)
    for name in OPERATIONS:
        setattr(os, name, dying(name, getattr(os, name)))


class Forked:
    """In place of subprocess.Popen, to start a saver in milliseconds; it dies if there is a `death`, a number and a note."""

    deaths: Iterator[tuple[int, Path] | None]

    def __init__(self, command: Sequence[str], *, pass_fds: Sequence[int], **_: Any):
        (descriptor,), death, self._status = pass_fds, next(self.deaths), None
        self.pid = os.fork()
        if self.pid == 0:
            os.closerange(3, descriptor)
            os.closerange(descriptor + 1, 256)
            if death is not None:
                die_at(*death)
            saver.main(descriptor)
            os._exit(0)

    def kill(self) -> None:
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status


def at_once(path: Path, number: int, note: Path) -> bool:
    """Save in a process that dies at operation `number`. Return True if it has not died."""
    if (child := os.fork()) == 0:
        die_at(number, note)
        write_checkpoint(path, keep=1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def beside(path: Path, number: int, note: Path, victim: int) -> bool:
    """Save beside training as two ranks do (saves.py); the process of rank `victim` dies. Return True if it has not."""
    Forked.deaths = iter([(number, note) if rank == victim else None for rank in range(2)])
    savers = [SaverProcess() for _ in range(2)]
    unnamed = begin(path)
    for rank, process in enumerate(savers):
        block = CheckpointBlock("w", (8,), (4 * rank,), torch.zeros(4), is_written=True, is_padded=False)
        publication = Publication(unnamed, path, num_ranks=2, keep=1) if rank == 0 else None
        process.start(Snapshot([block]), str(unnamed / "shards"), rank, publication)
    problems = [process.wait("written", 60) for process in savers]
    if problems == [None, None]:
        problems = [savers[0].wait("done", 60)]
    for process in savers:
        process.close()
    told = [problem for problem in problems if problem]
    assert told in ([], ["the process that writes it has ended (signal 9)"]), told
    return not told


def deaths(folder: Path, save: Callable[[Path, int, Path], bool]) -> list[str]:
    """Return the operations at which the victim died, one for each attempt, each in its own run folder."""
    died: list[str] = []
    for number in itertools.count():
        checkpoints, note = folder / str(number) / "checkpoints", folder / f"{number}.died"
        write_checkpoint(checkpoints / "step_000001")
        if save(checkpoints / "step_000002", number, note):
            return died
        died.append(note.read_text())
    raise AssertionError


def main(folder: Path) -> None:
    background.subprocess.Popen = Forked  # type: ignore[assignment,misc]
    ways = {"rank": at_once, "saver0": partial(beside, victim=0), "saver1": partial(beside, victim=1)}
    print(json.dumps({victim: deaths(folder / victim, save) for victim, save in ways.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
