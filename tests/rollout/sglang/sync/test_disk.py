"""Weights by files: disks without room, and which versions stay on disk."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dapo_mcore.errors import ConfigError, RolloutError
from dapo_mcore.rollout.sglang.sync.disk import DiskSender, check_sync_dir
from tests.rollout.sglang.asserts import assert_whole
from tests.rollout.sglang.serving import engine, params, prompts, weights


def test_a_folder_too_small_for_two_versions_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"two versions of the model need 2000000\.0 GiB; choose a larger folder"):
        DiskSender(tmp_path / "weights", 10**6 * 2**30)


def test_weights_are_locked_as_long_as_their_run_lives(tmp_path):
    """So a job can delete the weights that a killed one has left in memory."""
    lock = ["flock", "--nonblock", str(tmp_path / "weights"), "true"]
    sender = DiskSender(tmp_path / "weights", 1)
    assert subprocess.run(lock).returncode == 1
    lock[2] = str(sender.root.rename(tmp_path / "left"))
    sender.close()
    sender.close()
    assert subprocess.run(lock).returncode == 0


def test_servers_on_other_machines_do_not_see_this_ones_memory(monkeypatch):
    mounts = [SimpleNamespace(mountpoint=at, fstype=kind) for at, kind in (("/", "ext4"), ("/dev/shm", "tmpfs"))]
    monkeypatch.setattr("psutil.disk_partitions", lambda all: mounts)
    here, far = "http://127.0.0.1:30000", "http://192.0.2.7:30000"
    check_sync_dir(Path("/dev/shm"), [here])
    check_sync_dir(Path("/shared/weights"), [here, far])
    told = rf"sync_dir /dev/shm is in this machine's memory, but 1 of 2 servers are on others: {far}; set sync_dir to a folder"
    with pytest.raises(ConfigError, match=told):
        check_sync_dir(Path("/dev/shm"), [here, far])


def test_a_full_disk_is_an_error_with_the_free_room_and_the_old_weights_stay_served(tmp_path, monkeypatch):
    with engine(tmp_path) as made:
        made.update_weights(weights(0), version=1)

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("dapo_mcore.rollout.sglang.sync.disk.SafetensorsWriter", full)
            left = weights(1)
            with pytest.raises(RolloutError, match=r"cannot be written .*No space left .* GiB are free there"):
                made.update_weights(left, version=2)
        assert list(left) == [] and made.weight_version == 1
        assert [path.name for path in made.sender.root.iterdir()] == [made.pool.weight_version]
        asked = prompts(2)
        assert_whole(made.generate(asked, params(8)), asked, 8, version=1)


def test_an_old_version_that_cannot_be_deleted_yet_is_deleted_at_the_next_update(tmp_path, monkeypatch):
    """As on NFS while a server has a file of it open."""
    with engine(tmp_path) as made:
        made.update_weights(weights(0), version=1)
        first = made.pool.weight_version

        def busy(path: Path, ignore_errors: bool = False) -> None:
            if path.name == first and not ignore_errors:
                raise OSError(39, "Directory not empty")

        with monkeypatch.context() as patch:
            patch.setattr("dapo_mcore.rollout.sglang.sync.disk.shutil.rmtree", busy)
            made.update_weights(weights(1), version=2)
        second = made.pool.weight_version
        assert made.weight_version == 2 and {p.name for p in made.sender.root.iterdir()} == {first, second}
        made.update_weights(weights(2), version=3)
        assert [path.name for path in made.sender.root.iterdir()] == [made.pool.weight_version]
