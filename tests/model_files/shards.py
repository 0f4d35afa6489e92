"""Writes tensors as the shards of several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from dapo_mcore.actor.checkpoint_blocks import CheckpointBlock
from dapo_mcore.checkpoint.shard_file import part_path, read_parts, write_shard
from dapo_mcore.checkpoint.snapshot import Snapshot

Piece = tuple[str, Tensor, tuple[int, ...], Tensor]
"""A key, the whole tensor, the piece's offsets in it, and its elements."""


def write_shards(folder: Path, ranks: Sequence[Sequence[Piece]]) -> None:
    """Write the pieces of each rank, and the index."""
    folder.mkdir(parents=True)
    for rank, pieces in enumerate(ranks):
        write_part(folder, rank, pieces)
    index = read_parts(folder, len(ranks))
    (folder / "index.json").write_bytes(index.to_json())
    for rank in range(len(ranks)):
        part_path(folder, rank).unlink()


def write_part(folder: Path, rank: int, pieces: Sequence[Piece]) -> None:
    blocks = [
        CheckpointBlock(key, tuple(whole.shape), at, data.contiguous(), True, False) for key, whole, at, data in pieces
    ]
    snapshot = Snapshot(blocks)
    write_shard(folder, rank, snapshot.header, snapshot.slices, snapshot.pieces)
