"""One rank's shard: a safetensors file that other tools read, its part of the index, and how its bytes reach the disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dapo_mcore.checkpoint import shard_file
from dapo_mcore.checkpoint.shard_file import part_path, read_parts
from dapo_mcore.errors import DamagedCheckpoint
from tests.model_files.shards import write_part

WHOLE = torch.arange(24.0).view(4, 6)
HALF = WHOLE.to(torch.bfloat16)


def test_a_shard_is_a_safetensors_file_with_a_name_for_each_slice(tmp_path: Path) -> None:
    write_part(
        tmp_path,
        3,
        [("h", HALF, (0, 0), HALF[:2]), ("w", WHOLE, (2, 3), WHOLE[2:, 3:]), ("e", WHOLE, (0, 0), WHOLE[:0])],
    )
    found = safetensors.torch.load_file(tmp_path / "rank_00003.safetensors")
    assert list(found) == ["w[2,3]", "h[0,0]"], "wider types first, and nothing that is empty"
    assert torch.equal(found["w[2,3]"], WHOLE[2:, 3:]) and torch.equal(found["h[0,0]"], HALF[:2])


def test_a_rank_without_slices_writes_only_an_empty_part(tmp_path: Path) -> None:
    write_part(tmp_path, 0, [])
    write_part(tmp_path, 1, [("w", WHOLE, (0, 0), WHOLE)])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("rank_00000.json", "rank_00001.json", "rank_00001.safetensors")
    ]
    assert list(read_parts(tmp_path, 2).tensors) == ["w"]


def test_parts_with_a_hole_are_refused(tmp_path: Path) -> None:
    write_part(tmp_path, 0, [("w", WHOLE, (0, 0), WHOLE[:3])])
    with pytest.raises(DamagedCheckpoint, match="is incomplete: w has 18 of 24 elements"):
        read_parts(tmp_path, 1)


def test_the_part_of_the_index_comes_after_all_bytes_are_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And at most two pieces are on their way to the disk at any time."""
    synced: list[tuple[str, int]] = []
    for name in ("fsync", "fdatasync"):
        sync = getattr(os, name)

        def record(file: int, sync=sync) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{file}"))
            synced.append((path.name, path.stat().st_size))
            assert path.suffix == ".new" or not part_path(tmp_path, 0).exists()
            sync(file)

        monkeypatch.setattr(os, name, record)
    monkeypatch.setattr(shard_file, "PIECE", 64)
    big = torch.zeros(100, 1000)
    monkeypatch.setattr("dapo_mcore.checkpoint.snapshot.PIECE", 80_000)
    write_part(tmp_path, 0, [("w", big, (0, 0), big)])
    size = (tmp_path / "rank_00000.safetensors").stat().st_size
    names = [name for name, _ in synced]
    assert names == ["rank_00000.safetensors"] * (len(names) - 1) + ["rank_00000.new"] and len(names) >= 6
    assert synced[-2] == ("rank_00000.safetensors", size)


def test_an_error_of_the_disk_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_part(tmp_path, 0, [("w", WHOLE, (0, 0), WHOLE)])
    assert not part_path(tmp_path, 0).exists()
