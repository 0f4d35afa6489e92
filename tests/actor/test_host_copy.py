"""Storages on the host and back: values, the memory that it takes, and what happens if there is too little."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dapo_mcore.actor import host_copy
from dapo_mcore.actor.host_copy import GIB, PIECE, HostCopy, buffer_sizes, pinned_bytes
from dapo_mcore.errors import ResourceError


def test_storages_lie_one_after_the_other_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_copy, "PIECE", 64)
    tensors = [torch.arange(size, dtype=torch.float32) for size in (5, 40, 1, 16)]  # 20, 160, 4 and 64 bytes
    views, copy = [tensor[1:] for tensor in tensors], HostCopy(pinned=False)
    for _ in range(2):
        copy.offload([tensor.untyped_storage() for tensor in tensors])
        assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [0] * 4
        assert copy.nbytes == 248 and buffer_sizes(248) == [64, 64, 64, 56]
        copy.onload()
        for tensor, view in zip(tensors, views):
            assert tensor.tolist() == list(range(len(tensor))) and view.data_ptr() == tensor[1:].data_ptr()


def test_pinned_memory_is_rounded_up_once_not_per_storage() -> None:
    """Three storages of 1.1 GiB in a buffer each would take 6 GiB of pinned memory."""
    total = 3 * int(1.1 * GIB)
    assert 3 * pinned_bytes(int(1.1 * GIB)) == 6 * GIB
    assert total <= sum(map(pinned_bytes, buffer_sizes(total))) <= total + PIECE // 2
    assert [pinned_bytes(size) for size in (0, 1, 2, 3, 4096, 4097)] == [0, 1, 2, 4, 4096, 8192]
    assert buffer_sizes(0) == [] and buffer_sizes(2 * PIECE) == [PIECE, PIECE]


@pytest.mark.parametrize("available, num_ranks", [(3, 1), (8, 3)], ids=["alone", "with the other ranks"])
def test_too_little_host_memory_is_refused_before_anything_moves(monkeypatch, available, num_ranks) -> None:
    host = SimpleNamespace(available=available * 2**20, total=8 * 2**20)
    monkeypatch.setattr(host_copy.psutil, "virtual_memory", lambda: host)
    tensor = torch.ones(2**20)  # 4 MiB
    copy = HostCopy(pinned=False, num_ranks=num_ranks)
    with pytest.raises(ResourceError, match=rf"this rank's actor .* {num_ranks} ranks, but 0\.0 GiB of host memory"):
        copy.offload([tensor.untyped_storage()])
    assert float(tensor.sum()) == 2**20
    HostCopy(pinned=False, num_ranks=2).offload([tensor[:1].clone().untyped_storage()])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_memory_is_free_while_values_are_on_the_host() -> None:
    whole = torch.arange(2**24, device="cuda", dtype=torch.float32)
    shard = whole[2**23 :]
    copy, before = HostCopy(pinned=True), torch.cuda.memory_allocated()
    copy.offload([whole.untyped_storage()])
    assert torch.cuda.memory_allocated() == before - 2**26
    copy.onload()
    shard += 1  # still a view of the same values
    assert torch.cuda.memory_allocated() == before
    assert whole[2**23 - 1 :][:2].tolist() == [2**23 - 1, 2**23 + 1]
