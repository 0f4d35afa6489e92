"""Digests by hand, of any split of a tensor, and of an actor on meshes of real processes."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from dapo_mcore.actor.checkpoint_blocks import CheckpointBlock, rectangles
from dapo_mcore.replay.digest import DigestSums, tensor_name
from tests.actor.parity import Mesh, spawn
from tests.replay.digesting import digests_of_a_step


class OneRank:
    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        return values


def block(whole: torch.Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...], **more: Any) -> CheckpointBlock:
    data = whole[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))].contiguous()
    fields = {"key": "w", "size": tuple(whole.shape), "is_written": True, "is_padded": False} | more
    return CheckpointBlock(offsets=offsets, data=data, **fields)


def digest(*blocks: CheckpointBlock, num_rows: int = 0):
    sums = DigestSums()
    for one in blocks:
        sums.add_block(one, num_rows)
    return sums.reduce(["w"], OneRank())["w"]


def whole(tensor: torch.Tensor):
    return digest(block(tensor, (0,) * tensor.dim(), tuple(tensor.shape)))


def mix(x: int) -> int:
    """Return splitmix64's finalizer, in Python's whole numbers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_a_digest_by_hand():
    odd, bits = 0x9E3779B97F4A7C15, (0x3F800000, 0xC0000000, 0x40400000)  # of 1, -2 and 3 in fp32
    expected = sum(mix((number * odd + value) % 2**64) for number, value in enumerate(bits)) % 2**64
    signs = [1 if mix(number * odd % 2**64) % 2 == 0 else -1 for number in range(3)]
    found = whole(torch.tensor([1.0, -2.0, 3.0]))
    assert found.hash == f"{expected:016x}"
    assert found.norm == math.sqrt(14) and found.projection == signs[0] - 2 * signs[1] + 3 * signs[2]
    assert {1, -1} == {1 if mix(number * odd % 2**64) % 2 == 0 else -1 for number in range(8)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_split_of_a_tensor_has_the_digest_of_the_whole(dtype):
    tensor = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = whole(tensor)
    for cuts in ((0, 105), (0, 1, 105), (0, 17, 18, 50, 104, 105), tuple(range(106))):
        pieces = [
            block(tensor, offsets, sizes)
            for start, stop in pairwise(cuts)
            for offsets, sizes in rectangles(tensor.shape, start, stop)
        ]
        assert digest(*reversed(pieces)).hash == expected.hash
    columns = [block(tensor, (0, 0, start), (3, 5, 1)) for start in range(7)]
    found = digest(*columns)
    assert found.hash == expected.hash
    assert (found.norm, found.projection) == pytest.approx((expected.norm, expected.projection), rel=1e-12)


def test_chunks_do_not_show(monkeypatch):
    tensor = torch.arange(1000.0).view(10, 100)
    expected = whole(tensor)
    monkeypatch.setattr("dapo_mcore.replay.digest._CHUNKS", {"cpu": 7})
    assert whole(tensor) == expected


def test_a_flipped_bit_two_swapped_elements_and_a_sign_of_zero_change_the_hash():
    tensor = torch.randn(64, 33, generator=torch.Generator().manual_seed(2))
    hashes = {whole(tensor).hash}
    for bit in range(32):
        changed = tensor.clone()
        changed.view(torch.int32)[40, 2] ^= (1 << bit) - (2**32 if bit == 31 else 0)
        hashes.add(whole(changed).hash)
    swapped = tensor.clone()
    swapped[3, 4], swapped[50, 6] = tensor[50, 6].clone(), tensor[3, 4].clone()
    hashes |= {whole(swapped).hash, whole(tensor.t()).hash}
    assert len(hashes) == 1 + 32 + 2
    assert whole(torch.tensor([0.0])).hash != whole(torch.tensor([-0.0])).hash
    rolled = whole(tensor.roll(1, 0))
    assert rolled.norm == pytest.approx(whole(tensor).norm, rel=1e-12), "the norm alone does not see it"
    assert abs(rolled.projection - whole(tensor).projection) > 1


def test_a_projection_tells_how_far_two_tensors_are_apart():
    generator = torch.Generator().manual_seed(3)
    tensor, noise = (torch.randn(200, 200, generator=generator, dtype=torch.float64) for _ in range(2))
    apart = [abs(whole(tensor + size * noise).projection - whole(tensor).projection) for size in (1e-2, 1e-6)]
    assert 0.02 < apart[0] / (1e-2 * noise.norm()) < 4 and apart[0] / apart[1] == pytest.approx(1e4, rel=1e-4)


def test_rows_that_only_pad_the_vocabulary_do_not_count():
    words = torch.randn(5, 4, generator=torch.Generator().manual_seed(4))
    expected = whole(words)
    for rows, cut in ((6, 3), (8, 4)):  # two ranks
        padded = torch.cat([words, torch.full((rows - 5, 4), torch.nan)])
        halves = [block(padded, (start, 0), (rows // 2, 4), is_padded=True) for start in (0, cut)]
        assert digest(*halves, num_rows=5).hash == expected.hash


def test_a_stacked_tensor_is_named_by_its_layer():
    one = block(torch.zeros(6, 4), (3, 0), (1, 4), key="decoder.layers.mlp.linear_fc2.weight")
    assert tensor_name(one) == "decoder.layers.3.mlp.linear_fc2.weight"
    assert tensor_name(one._replace(key="decoder.layers.5.w")) == "decoder.layers.5.w"


@pytest.mark.parametrize("mesh", [Mesh(tensor=2, pipeline=2), Mesh(context=2)], ids=str)
def test_ranks_of_any_kind_find_the_digests_of_one_process(alone, mesh):
    one = digests_of_a_step(alone, Mesh(), {})
    many = spawn(digests_of_a_step, mesh, {"optimizer__distributed": True})
    assert many.keys() == one.keys() and all(many[kind].keys() == one[kind].keys() for kind in one if kind != "tokens")
    assert {f"decoder.layers.{layer}.self_attention.linear_qkv.weight" for layer in range(4)} <= one["start"].keys()
    hashes = [{name: digest["hash"] for name, digest in found["start"].items()} for found in (many, one)]
    assert hashes[0] == hashes[1], "the same weights"
    assert many["inputs"]["advantages"]["hash"] == one["inputs"]["advantages"]["hash"]
    assert one["step"].keys() == one["start"].keys() | {"logprobs"} and one["inputs"].keys() == {
        "old_logprobs",
        "advantages",
    }
    for kind in ("inputs", "step", "end"):
        for name, expected in one[kind].items():
            found, scale = many[kind][name], expected["norm"]
            apart = max(abs(found[figure] - expected[figure]) for figure in ("norm", "projection"))
            assert scale > 0 and apart <= 1e-4 * scale, (kind, name, apart / scale)
    assert one["end"] != one["start"]
