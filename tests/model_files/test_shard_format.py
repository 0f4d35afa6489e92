"""The index of shards: it reads back, parts are joined, and what does not fit together is refused."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest

from dapo_mcore.errors import DamagedCheckpoint
from dapo_mcore.model_files.shard_format import (
    CHUNK,
    ShardIndex,
    Slice,
    StoredFile,
    StoredTensor,
    checksums,
    merged,
    parse_index,
)


def part(rank: int, shape: tuple[int, ...] = (2, 8), dtype: str = "F32") -> ShardIndex:
    """The index of a writer of one of two rows."""
    name = f"rank_{rank:05d}.safetensors"
    row = Slice((rank, 0), (1, 8), name, 100, (7 + rank,))
    return ShardIndex({"w": StoredTensor(dtype, shape, [row])}, {name: StoredFile(132, 100, 5)})


def test_the_index_of_two_writers_reads_back() -> None:
    whole = merged([part(0), part(1)])
    whole.check_covered(Path("shards"))
    assert parse_index(whole.to_json(), Path("index.json")) == whole
    assert [row.offsets for row in whole.tensors["w"].slices] == [(0, 0), (1, 0)]


def test_a_hole_and_an_element_twice_are_refused() -> None:
    with pytest.raises(DamagedCheckpoint, match="shards is incomplete: w has 8 of 16 elements"):
        part(0).check_covered(Path("shards"))
    with pytest.raises(DamagedCheckpoint, match="w has 24 of 16 elements"):
        merged([part(0), part(1), part(1)]).check_covered(Path("shards"))


def test_writers_that_disagree_about_a_tensor_are_refused() -> None:
    with pytest.raises(DamagedCheckpoint, match=r"w is F32 \[2, 8\] in one shard and F32 \[3, 8\] in another"):
        merged([part(0), part(1, shape=(3, 8))])
    with pytest.raises(DamagedCheckpoint, match=r"w is F32 \[2, 8\] in one shard and BF16 \[2, 8\] in another"):
        merged([part(0), part(1, dtype="BF16")])


GOOD = json.loads(part(0).to_json())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        part(0).to_json()[:-5],
        *(json.dumps(GOOD | change).encode() for change in ({"format": 2}, {"checksum": "md5"}, {"files": [1]})),
        json.dumps(GOOD | {"tensors": {"w": ["F32", [2, 8]]}}).encode(),
        json.dumps(GOOD | {"tensors": {"w": ["F32", [2, 8], [[[0], [8], 0, 100, [7]]]]}}).encode(),
        json.dumps(GOOD | {"tensors": {"w": ["F32", [2, 8], [[[0, 0], [1, 8], 9, 100, [7]]]]}}).encode(),
    ],
)
def test_what_is_no_index_is_damaged(content: bytes) -> None:
    with pytest.raises(DamagedCheckpoint, match=r"index\.json is damaged: "):
        parse_index(content, Path("index.json"))


def test_there_is_a_checksum_for_every_chunk() -> None:
    data = bytes(CHUNK) + b"end"
    assert checksums(memoryview(data)) == [zlib.crc32(bytes(CHUNK)), zlib.crc32(b"end")]
    assert checksums(memoryview(b"")) == []
