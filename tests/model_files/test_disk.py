"""Files and folders reach the disk before others learn of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dapo_mcore.model_files.disk import sync_to_disk


def test_the_file_or_folder_itself_is_synced_and_closed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[int, str]] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append((fd, os.readlink(f"/proc/self/fd/{fd}"))))
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path):
        sync_to_disk(path)
    assert [path for _, path in synced] == [str(tmp_path / "file"), str(tmp_path)]
    for descriptor, _ in synced:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_a_disk_that_fails_is_an_error_and_leaves_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        opened.append(descriptor)
        raise OSError(5, "Input/output error")

    opened: list[int] = []
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        sync_to_disk(tmp_path)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])
    with pytest.raises(FileNotFoundError):
        sync_to_disk(tmp_path / "absent")
