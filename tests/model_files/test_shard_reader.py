"""Regions of tensors in shards: they equal the tensor's, only their bytes are read, and each of these is checked."""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from dapo_mcore.errors import CheckpointError, DamagedCheckpoint
from dapo_mcore.model_files import shard_reader
from dapo_mcore.model_files.shard_format import CHUNK, SHARDS
from dapo_mcore.model_files.shard_reader import ShardReader
from tests.model_files.peak_memory import PeakMemory, give_freed_memory_back
from tests.model_files.shards import write_shards

WHOLE = torch.arange(3 * 5 * 7, dtype=torch.float32).view(3, 5, 7)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A tensor [3, 5, 7] in six slices of two files, and 12 MiB of bf16 in one slice: three chunks of 2,048 rows."""
    cuts = [(slice(layer, layer + 1), rows) for layer in range(3) for rows in (slice(0, 2), slice(2, 5))]
    pieces = [("w", WHOLE, (layers.start, rows.start, 0), WHOLE[layers, rows]) for layers, rows in cuts]
    big = torch.arange(6144 * 1024).remainder(251).view(6144, 1024).to(torch.bfloat16)
    write_shards(tmp_path / SHARDS, [[*pieces[:3], ("big", big, (0, 0), big)], pieces[3:]])
    return tmp_path / SHARDS


def test_any_region_equals_the_tensors(shards: Path) -> None:
    reader = ShardReader(shards)
    assert (reader.size("w"), reader.dtype("w"), reader.num_parts("w")) == ((3, 5, 7), torch.float32, 6)
    ranges = [[(low, high) for low in range(size) for high in range(low + 1, size + 1)] for size in WHOLE.shape]
    for region in [*product(ranges[0], ranges[1], ranges[2][::5]), *product(ranges[0][:1], ranges[1][::4], ranges[2])]:
        found = reader.read("w", [low for low, _ in region], [high - low for low, high in region])
        assert torch.equal(found, WHOLE[tuple(slice(*part) for part in region)]), region


def test_a_region_is_read_into_a_part_of_another_tensor(shards: Path) -> None:
    target = torch.full((2, 9), -1.0)
    ShardReader(shards).fill([("w", (1, 1, 3), target[:, 5:].view(1, 2, 4))])
    assert torch.equal(target[:, 5:], WHOLE[1, 1:3, 3:])
    assert target[:, :5].eq(-1).all()
    ShardReader(shards).fill([("w", (0, 0, 0), torch.empty(1, 0, 7))])


@pytest.mark.parametrize(
    ("offsets", "sizes", "num_bytes"),
    [((0, 0), (1, 1024), CHUNK), ((2040, 0), (16, 1024), 2 * CHUNK), ((4096, 1000), (2048, 24), CHUNK)],
)
def test_only_the_chunks_of_a_region_are_read(
    shards: Path, monkeypatch: pytest.MonkeyPatch, offsets: Any, sizes: Any, num_bytes: int
) -> None:
    counted: list[int] = []
    preadv = os.preadv

    def count(*arguments: Any) -> int:
        counted.append(preadv(*arguments))
        return counted[-1]

    monkeypatch.setattr(os, "preadv", count)
    ShardReader(shards).read("big", offsets, sizes)
    assert sum(counted) == num_bytes


def test_a_region_is_read_in_bands(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller ones than by default, and also smaller than a row."""
    whole = ShardReader(shards).read("big", (0, 0), (6144, 1024))
    for staging in (1 << 20, 1024):
        monkeypatch.setattr(shard_reader, "_STAGING", staging)
        reader = ShardReader(shards)
        assert torch.equal(reader.read("big", (2046, 500), (4, 524)), whole[2046:2050, 500:])


def test_a_large_region_takes_the_memory_of_a_band(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_reader, "_STAGING", CHUNK)
    give_freed_memory_back()
    reader, target = ShardReader(shards), torch.zeros(6144, 1024, dtype=torch.bfloat16)  # 12 MiB
    with PeakMemory() as memory:
        reader.fill([("big", (0, 0), target)])
    assert memory.peak_bytes < 2.5 * CHUNK


def test_the_system_is_told_what_is_read_next(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands of one chunk, and the next one announced before a band is read. No file stays open, even if one is damaged."""
    monkeypatch.setattr(shard_reader, "_STAGING", CHUNK)
    events: list[tuple[str, int]] = []
    preadv = os.preadv
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, size, advice: events.append(("told", start)))
    monkeypatch.setattr(os, "preadv", lambda file, views, at: (events.append(("read", at)), preadv(file, views, at))[1])
    reader, target = ShardReader(shards), torch.zeros(6144, 1024, dtype=torch.bfloat16)
    num_files = psutil.Process().num_fds()
    reader.fill([("big", (0, 0), target)])
    first = events[0][1]
    chunks = [first, first + CHUNK, first + 2 * CHUNK]
    assert events == [
        *(("told", chunks[0]), ("told", chunks[1]), ("read", chunks[0])),
        *(("told", chunks[2]), ("read", chunks[1]), ("read", chunks[2])),
    ]
    path = shards / "rank_00000.safetensors"
    path.write_bytes(path.read_bytes()[: first + CHUNK] + bytes(2 * CHUNK))
    with pytest.raises(DamagedCheckpoint, match=f"at byte {first + CHUNK}$"):
        reader.fill([("big", (0, 0), target)])
    assert psutil.Process().num_fds() == num_files


def test_a_flipped_bit_is_found_where_it_is_read(shards: Path) -> None:
    path = shards / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # big is narrower than w, so it lies last
    path.write_bytes(content)
    reader = ShardReader(shards)
    reader.read("big", (0, 0), (4096, 1024))
    told = rf"rank_00000\.safetensors is changed: the checksum of big at \[0, 0\] does not hold at byte {len(content) - CHUNK}"
    with pytest.raises(DamagedCheckpoint, match=told):
        reader.read("big", (6143, 0), (1, 1))


def test_a_changed_header_and_a_wrong_size_are_found(shards: Path) -> None:
    path = shards / "rank_00001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:9] + b"!" + content[10:])
    with pytest.raises(DamagedCheckpoint, match="the checksum of its header does not hold"):
        ShardReader(shards).read("w", (2, 0, 0), (1, 1, 1))
    for changed, problem in ((content[:-1], "is truncated"), (content + b"1", "is changed")):
        path.write_bytes(changed)
        with pytest.raises(DamagedCheckpoint, match=f"{problem}: it has {len(changed)} of {len(content)} bytes"):
            ShardReader(shards)
    path.unlink()
    with pytest.raises(DamagedCheckpoint, match="is missing"):
        ShardReader(shards)


def test_an_unknown_tensor_is_named(shards: Path) -> None:
    with pytest.raises(CheckpointError, match="has no tensor v; it does not fit"):
        ShardReader(shards).read("v", (0,), (1,))
