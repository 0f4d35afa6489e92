"""The folders of checkpoints: which is the latest, how a new one replaces another, and how old ones are deleted."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from dapo_mcore.checkpoint import run_folder as checkpoint_folder
from dapo_mcore.checkpoint.run_folder import (
    checkpoint_path,
    commit,
    drop_old,
    latest_checkpoint,
    new_partial,
    step_of,
)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 1, 2 and 3, each with a file, and unfinished ones."""
    for step in (1, 2, 3):
        path = checkpoint_path(tmp_path, step)
        path.mkdir(parents=True)
        (path / "state.json").touch()
    (tmp_path / "checkpoints" / "step_000004.partial").mkdir()
    (tmp_path / "checkpoints" / "step_000009.deleted").mkdir()
    return tmp_path


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_the_latest_is_whole_and_has_the_highest_step(run_dir: Path) -> None:
    assert latest_checkpoint(run_dir) == run_dir / "checkpoints" / "step_000003"
    assert latest_checkpoint(run_dir, before=3) == run_dir / "checkpoints" / "step_000002"
    assert latest_checkpoint(run_dir, before=1) is None
    checkpoint_path(run_dir, 1_000_000).mkdir()
    assert step_of(latest_checkpoint(run_dir)) == 1_000_000


def test_a_finished_folder_replaces_one_of_its_name(run_dir: Path) -> None:
    folder = checkpoint_path(run_dir, 3)
    partial = new_partial(folder)
    (partial / "shards").mkdir()
    commit(partial, folder)
    assert [path.name for path in folder.iterdir()] == ["shards"]
    drop_old(folder, 5, pytest.fail)
    drop_old(folder, None, pytest.fail)
    assert names(run_dir) == ["step_000001", "step_000002", "step_000003"]


@pytest.mark.parametrize("left", ["folder", "file", "link"])
def test_leftovers_of_failed_attempts_are_deleted_and_each_attempt_has_a_folder_of_its_own(
    tmp_path: Path, left: str
) -> None:
    partial, elsewhere = tmp_path / "step_000001.partial", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    if left == "folder":
        partial.mkdir()
        (partial / "junk").touch()
    elif left == "file":
        partial.touch()
    else:
        partial.symlink_to(elsewhere)
    made = [new_partial(tmp_path / "step_000002") for _ in range(2)]
    assert made[0] != made[1] and list(made[1].iterdir()) == []
    assert sorted(tmp_path.iterdir()) == [elsewhere, made[1]]
    assert (elsewhere / "precious").exists()


def test_old_checkpoints_are_deleted_and_the_newest_stays(run_dir: Path) -> None:
    """Also if the newest has the lowest step, as after a start anew from an older one."""
    drop_old(checkpoint_path(run_dir, 1), 2, pytest.fail)
    assert names(run_dir) == ["step_000001", "step_000003", "step_000004.partial"]


def test_a_link_is_deleted_and_its_target_stays(run_dir: Path) -> None:
    elsewhere = run_dir / "elsewhere"
    checkpoint_path(run_dir, 1).rename(elsewhere)
    checkpoint_path(run_dir, 1).symlink_to(elsewhere)
    drop_old(checkpoint_path(run_dir, 3), 1, pytest.fail)
    assert names(run_dir) == ["step_000003", "step_000004.partial"]
    assert (elsewhere / "state.json").exists()


def busy(path: Path) -> None:
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), "upload")


def test_a_folder_that_cannot_be_deleted_gives_a_warning_and_is_tried_again(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old checkpoint with a mount inside: what is left of it must not look like a checkpoint."""
    told: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        drop_old(checkpoint_path(run_dir, 3), 2, told.append)
    assert [line for line in told if "step_000001" in line] == [
        f"warning: the old checkpoint {run_dir}/checkpoints/step_000001.deleted cannot be deleted (Device or resource "
        f"busy): training goes on, and the next checkpoint tries again"
    ]
    assert latest_checkpoint(run_dir, before=2) is None
    drop_old(checkpoint_path(run_dir, 3), 2, pytest.fail)
    assert names(run_dir) == ["step_000002", "step_000003", "step_000004.partial"]


def test_a_folder_that_cannot_be_deleted_does_not_block_the_next_of_its_name(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        for _ in range(2):
            commit(new_partial(checkpoint_path(run_dir, 3)), checkpoint_path(run_dir, 3))
    assert [name for name in names(run_dir) if "00003" in name or "00004" in name] == [
        *("step_000003", "step_000003.deleted", "step_000003.deleted1", "step_000004.partial")
    ]
    drop_old(checkpoint_path(run_dir, 3), 3, pytest.fail)
    assert names(run_dir) == ["step_000001", "step_000002", "step_000003", "step_000004.partial"]


def test_a_checkpoint_that_is_a_mount_stays_whole(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    monkeypatch.setattr(checkpoint_folder.os, "rename", lambda source, target: busy(source))
    drop_old(checkpoint_path(run_dir, 3), 2, told.append)
    assert len(told) == 1 and "step_000001 cannot be deleted (Device or resource busy)" in told[0]
    assert (checkpoint_path(run_dir, 1) / "state.json").exists()
