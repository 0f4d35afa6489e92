"""A job of several files: written, resumed, kept apart from other jobs, and removed after an error."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dapo_mcore.convert.job import JOURNAL, Job, NoReport, OutputFile, Report
from dapo_mcore.errors import CheckpointError


class Recorder:
    """A report that remembers what it was told."""

    def __init__(self) -> None:
        self.started: list[tuple[int, int]] = []
        self.advanced = 0

    def start(self, total: int, done: int) -> None:
        self.started.append((total, done))

    def advance(self, num_bytes: int) -> None:
        self.advanced += num_bytes


class Writer:
    """Makes files of ten bytes. `fails` gives the error that writing a file of that name raises."""

    def __init__(self, **fails: BaseException):
        self.fails = fails
        self.written: list[str] = []

    def files(self, *names: str) -> list[OutputFile]:
        return [OutputFile(name, 10, self._of(name)) for name in names]

    def _of(self, name: str) -> Callable[[Path, Report], Any]:
        def write(path: Path, report: Report) -> Any:
            path.write_bytes(b"half ")
            if error := self.fails.get(Path(name).stem):
                raise error
            path.write_bytes(b"0123456789")
            report.advance(10)
            self.written.append(name)
            return {"of": name}

        return write


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "input").write_text("weights")
    return tmp_path / "input"


def run(out: Path, files: list[OutputFile], source: Path, options: tuple[str, ...] = (), report: Any = None) -> list:
    with Job(out, files, [source], options).run(report or NoReport()) as (folder, notes):
        (folder / "config.json").write_text("{}")
    return notes


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_job_writes_its_files_into_a_new_folder(tmp_path: Path, source: Path) -> None:
    writer, report = Writer(), Recorder()
    notes = run(tmp_path / "out", writer.files("a", "sub/b", "sub/c"), source, report=report)
    assert notes == [{"of": "a"}, {"of": "sub/b"}, {"of": "sub/c"}]
    assert listing(tmp_path) == ["input", "out", "out/a", "out/config.json", "out/sub", "out/sub/b", "out/sub/c"]
    assert (report.started, report.advanced) == ([(30, 0)], 30)


def test_folders_above_are_made(tmp_path: Path, source: Path) -> None:
    run(tmp_path / "x" / "y", Writer().files("a"), source)
    assert listing(tmp_path / "x") == ["y", "y/a", "y/config.json"]


def test_an_output_that_exists_is_left_alone(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(CheckpointError, match=r"out exists; give another folder, or remove it"):
        run(tmp_path / "out", Writer().files("a"), source)
    assert listing(tmp_path) == ["input", "out", "out/precious"]


@pytest.mark.parametrize("error", [CheckpointError("bad"), OSError(errno.EIO, "I/O error"), RuntimeError("bug")])
def test_after_an_error_nothing_is_left(tmp_path: Path, source: Path, error: Exception) -> None:
    with pytest.raises(type(error), match=str(error.args[-1])):
        run(tmp_path / "out", Writer(b=error).files("a", "b", "c"), source)
    assert listing(tmp_path) == ["input"]


def test_an_error_in_the_last_part_leaves_nothing(tmp_path: Path, source: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="bug"),
        Job(tmp_path / "out", Writer().files("a"), [source], ()).run(NoReport()),
    ):
        raise RuntimeError("bug")
    assert listing(tmp_path) == ["input"]


def interrupted(tmp_path: Path, source: Path, options: tuple[str, ...] = ()) -> Path:
    """Interrupt a job in the third of three files, and return the folder that is left."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", Writer(c=KeyboardInterrupt()).files("a", "b", "c"), source, options)
    assert not (tmp_path / "out").exists()
    return tmp_path / "out.partial"


def test_an_interrupted_job_continues(tmp_path: Path, source: Path) -> None:
    partial = interrupted(tmp_path, source)
    assert sorted(json.loads((partial / JOURNAL).read_bytes())["done"]) == ["a", "b"]
    writer, report = Writer(), Recorder()
    notes = run(tmp_path / "out", writer.files("a", "b", "c"), source, report=report)
    assert writer.written == ["c"]
    assert notes == [{"of": "a"}, {"of": "b"}, {"of": "c"}]
    assert (report.started, report.advanced) == ([(30, 20)], 10)
    assert listing(tmp_path) == ["input", "out", "out/a", "out/b", "out/c", "out/config.json"]
    assert (tmp_path / "out" / "c").read_bytes() == b"0123456789"


def test_a_finished_file_that_vanished_is_made_again(tmp_path: Path, source: Path) -> None:
    (interrupted(tmp_path, source) / "a").unlink()
    writer = Writer()
    run(tmp_path / "out", writer.files("a", "b", "c"), source)
    assert sorted(writer.written) == ["a", "c"]


@pytest.mark.parametrize("change", ["size", "time", "options", "files", "journal"])
def test_another_job_starts_from_the_beginning(tmp_path: Path, source: Path, change: str) -> None:
    partial = interrupted(tmp_path, source)
    names, options = ["a", "b", "c"], ()
    if change == "size":
        before = source.stat()
        source.write_text("other weights")
        os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "time":
        os.utime(source, (1, 1))
    elif change == "options":
        options = ("tensor_parallel 2",)
    elif change == "files":
        names = ["a", "b", "d"]
    else:
        (partial / JOURNAL).write_text("{")
    writer = Writer()
    run(tmp_path / "out", writer.files(*names), source, options)
    assert sorted(writer.written) == names
    assert listing(tmp_path / "out") == sorted([*names, "config.json"])


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=40_000_000))
    with pytest.raises(CheckpointError, match=r"out needs 0\.1 GB, but its disk has 0\.0 GB free"):
        run(tmp_path / "out", Writer().files("a"), source)
    assert listing(tmp_path) == ["input"]


def test_a_disk_that_is_too_small_to_continue_keeps_the_finished_files(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path, source)
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="its disk has"):
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        run(tmp_path / "out", Writer().files("a", "b", "c"), source)
    writer = Writer()
    run(tmp_path / "out", writer.files("a", "b", "c"), source)
    assert writer.written == ["c"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_keeps_the_finished_files(tmp_path: Path, source: Path, number: int) -> None:
    full = OSError(number, os.strerror(number))
    with pytest.raises(CheckpointError, match=r"out is full; free some space and start again: 2 finished files in"):
        run(tmp_path / "out", Writer(c=full).files("a", "b", "c"), source)
    assert not (tmp_path / "out").exists()
    writer = Writer()
    run(tmp_path / "out", writer.files("a", "b", "c"), source)
    assert writer.written == ["c"]


def test_a_disk_that_fills_up_at_once_leaves_nothing(tmp_path: Path, source: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is full; free some space and start again$"):
        run(tmp_path / "out", Writer(a=OSError(errno.ENOSPC, "full")).files("a"), source)
    assert listing(tmp_path) == ["input"]


def test_a_folder_that_no_job_made_is_left_alone(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "precious").touch()
    with pytest.raises(CheckpointError, match=r"out\.partial is needed for the work, but holds precious"):
        run(tmp_path / "out", Writer().files("a"), source)
    assert listing(tmp_path) == ["input", "out.partial", "out.partial/precious"]


def test_a_job_that_was_interrupted_in_its_first_file_is_recognized(tmp_path: Path, source: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", Writer(a=KeyboardInterrupt()).files("a"), source)
    assert listing(tmp_path / "out.partial") == [JOURNAL, "a.tmp"]
    run(tmp_path / "out", Writer().files("a"), source)
    assert listing(tmp_path / "out") == ["a", "config.json"]


def test_only_one_process_at_a_time_works_on_a_job(tmp_path: Path, source: Path) -> None:
    interrupted(tmp_path, source)
    other = os.open(tmp_path / "out.partial", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    try:
        with pytest.raises(CheckpointError, match=r"another process writes to .*out\.partial"):
            run(tmp_path / "out", Writer().files("a"), source)
    finally:
        os.close(other)
    run(tmp_path / "out", (writer := Writer()).files("a", "b", "c"), source)
    assert writer.written == ["c"]
