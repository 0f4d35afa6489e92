"""The bytes of live tensors, in pieces. The file that they make: test_shard_file.py."""

from __future__ import annotations

import pytest
import torch

from dapo_mcore.actor.checkpoint_blocks import CheckpointBlock
from dapo_mcore.checkpoint import snapshot as module
from dapo_mcore.checkpoint.snapshot import Snapshot


def block(key: str, data: torch.Tensor) -> CheckpointBlock:
    return CheckpointBlock(key, tuple(data.shape), (0,) * data.dim(), data, is_written=True, is_padded=False)


def test_slices_follow_each_other_and_their_pieces_are_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 16)
    whole = torch.arange(10.0)
    snapshot = Snapshot([block("half", whole[:3].to(torch.bfloat16)), block("whole", whole)])
    assert [(planned.key, planned.num_bytes) for planned in snapshot.slices] == [("whole", 40), ("half", 6)]
    first, second = snapshot.slices
    assert (first.start, second.start, snapshot.num_bytes) == (
        len(snapshot.header),
        len(snapshot.header) + 40,
        len(snapshot.header) + 46,
    )
    assert len(snapshot.header) % 8 == 0
    pieces = [bytes(piece) for piece in snapshot.pieces(first)]
    assert [len(piece) for piece in pieces] == [16, 16, 8]
    assert b"".join(pieces) == whole.numpy().tobytes()
    whole[0] = 7.0
    assert bytes(next(iter(snapshot.pieces(first)))) == torch.tensor([7.0, 1, 2, 3]).numpy().tobytes(), "a live tensor"
