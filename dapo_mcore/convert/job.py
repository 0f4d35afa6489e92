"""A long conversion as a list of files: checked for space, written to a temporary folder, resumed, renamed when whole.

Change here: what survives an interruption, and what is asked before the first byte is written.

    OUT.partial/           what is written so far
    OUT.partial/.job.json  what is being converted, and the finished files
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dapo_mcore.errors import CheckpointError
from dapo_mcore.model_files.disk import sync_to_disk

JOURNAL = ".job.json"


class Report(Protocol):
    """Receives a job's progress in bytes of tensors, from several threads."""

    def start(self, total: int, done: int) -> None: ...

    def advance(self, num_bytes: int) -> None: ...


class NoReport:
    """Ignores the progress."""

    def start(self, total: int, done: int) -> None: ...

    def advance(self, num_bytes: int) -> None: ...


@dataclass(frozen=True)
class OutputFile:
    """A file of the output: `write(path, report)` writes it and returns a note (JSON), which `run` passes on."""

    name: str
    num_bytes: int
    write: Callable[[Path, Report], Any]


class _TooSmall(CheckpointError):
    """The disk is full. Files that were finished before are still good."""


class Job:
    """Writes the folder `out` from `files`.

    inputs, options   what the result depends on: an interrupted job is resumed only if all are unchanged (for files:
                      name, size and time)
    """

    def __init__(self, out: Path, files: Sequence[OutputFile], inputs: Sequence[Path], options: Sequence[str]):
        self.out, self.files = out, list(files)
        self.partial = out.with_name(out.name + ".partial")
        facts = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in inputs]
        self.identity = json.loads(json.dumps([facts, list(options), [file.name for file in files]]))

    @contextmanager
    def run(self, report: Report) -> Iterator[tuple[Path, list[Any]]]:
        """Write all files, yield (folder, the files' notes) so that the caller can add the rest, then rename the folder.

        Raises CheckpointError where `out` exists, the disk is too small, or the temporary folder is another process's or
        none of ours.
        After an error nothing is left but, where the disk is full, the finished files that a next start goes on with.
        """
        if self.out.exists():
            raise CheckpointError(f"{self.out} exists; give another folder, or remove it")
        self.partial.mkdir(parents=True, exist_ok=True)
        with _lock(self.partial):
            self._refuse_strangers()
            done: dict[str, Any] = {}
            try:
                done |= self._resume()
                self._check_space(done)
                report.start(sum(file.num_bytes for file in self.files), self._size(done))
                yield self.partial, self._make_all(done, report)
                self._finish()
            except Exception as error:
                full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
                if not done or not (full or isinstance(error, _TooSmall)):
                    shutil.rmtree(self.partial, ignore_errors=True)
                if full:
                    kept = f": {len(done)} finished files in {self.partial} are kept" if done else ""
                    raise _TooSmall(f"the disk of {self.out} is full; free some space and start again{kept}") from error
                raise

    def _refuse_strangers(self) -> None:
        """Raise CheckpointError for a folder of that name that no job has made: its contents belong to somebody."""
        names = [path.name for path in self.partial.iterdir()]
        if names and not any(name.startswith(JOURNAL) for name in names):
            raise CheckpointError(
                f"{self.partial} is needed for the work, but holds {min(names)}, which is not of an interrupted "
                f"conversion; move it away, or give another output folder"
            )

    def _resume(self) -> dict[str, Any]:
        """Return the notes of the files that an earlier start finished. If it was another job, empty the folder and return none."""
        try:
            stored = json.loads((self.partial / JOURNAL).read_bytes())
            if stored["identity"] == self.identity:
                return {name: note for name, note in stored["done"].items() if (self.partial / name).is_file()}
        except (OSError, ValueError, KeyError, TypeError):
            pass
        for path in self.partial.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._write_journal({})
        return {}

    def _size(self, done: dict[str, Any]) -> int:
        return sum(file.num_bytes for file in self.files if file.name in done)

    def _check_space(self, done: dict[str, Any]) -> None:
        left = sum(file.num_bytes for file in self.files) - self._size(done)
        needed, free = left + left // 50 + 50_000_000, shutil.disk_usage(self.partial).free
        if needed > free:
            raise _TooSmall(
                f"{self.out} needs {needed / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB free; free some or give another"
            )

    def _make_all(self, done: dict[str, Any], report: Report) -> list[Any]:
        """Return the notes of all files. Two are written at a time: one waits for the disk while the other computes."""
        with ThreadPoolExecutor(max_workers=2) as pool:
            works = [pool.submit(self._make, file, report) for file in self.files if file.name not in done]
            try:
                for work in as_completed(works):
                    name, note = work.result()
                    done[name] = note
                    self._write_journal(done)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                done |= dict(work.result() for work in works if not work.cancelled() and not work.exception())
                with suppress(OSError):
                    self._write_journal(done)
                raise
        return [done[file.name] for file in self.files]

    def _make(self, file: OutputFile, report: Report) -> tuple[str, Any]:
        path = self.partial / file.name
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_name(path.name + ".tmp")
        note = file.write(unfinished, report)
        sync_to_disk(unfinished)
        os.replace(unfinished, path)
        return file.name, note

    def _write_journal(self, done: dict[str, Any]) -> None:
        journal = self.partial / (JOURNAL + ".tmp")
        journal.write_text(json.dumps({"identity": self.identity, "done": done}), encoding="utf-8")
        os.replace(journal, self.partial / JOURNAL)

    def _finish(self) -> None:
        (self.partial / JOURNAL).unlink(missing_ok=True)
        for path in self.partial.rglob("*"):
            sync_to_disk(path)
        os.rename(self.partial, self.out)
        sync_to_disk(self.out.parent)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Lock the folder for this process. Raise CheckpointError if another process has locked it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(f"another process writes to {folder}; wait for it, or give another folder") from error
        yield
    finally:
        os.close(descriptor)
