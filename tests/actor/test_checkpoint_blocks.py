"""The rectangles of a flat slice by hand, and the blocks of an actor in one process. Over meshes: tests/checkpoint."""

from __future__ import annotations

from collections import Counter
from math import prod

import pytest
import torch

from dapo_mcore.actor.checkpoint_blocks import CheckpointBlock, checkpoint_blocks, rectangles, written_blocks
from tests.actor import parity
from tests.actor.parity import Mesh


@pytest.mark.parametrize(
    ("shape", "start", "stop", "expected"),
    [
        ((10,), 3, 7, [((3,), (4,))]),
        ((4, 4), 4, 12, [((1, 0), (2, 4))]),
        ((4, 4), 3, 10, [((0, 3), (1, 1)), ((1, 0), (1, 4)), ((2, 0), (1, 2))]),
        ((4, 4), 5, 7, [((1, 1), (1, 2))]),
        ((4, 4), 6, 10, [((1, 2), (1, 2)), ((2, 0), (1, 2))]),
        ((2, 3, 4), 10, 15, [((0, 2, 2), (1, 1, 2)), ((1, 0, 0), (1, 1, 3))]),
        ((4, 4), 7, 7, []),
    ],
)
def test_a_flat_slice_is_cut_into_rectangles_by_hand(shape, start, stop, expected):
    assert list(rectangles(shape, start, stop)) == expected


def test_the_rectangles_of_any_slice_hold_its_elements_in_order():
    numbers = torch.arange(3 * 2 * 5).view(3, 2, 5)
    for start in range(31):
        for stop in range(start, 31):
            found = []
            for offsets, sizes in rectangles(numbers.shape, start, stop):
                block = numbers[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))]
                found += block.flatten().tolist()
            assert found == list(range(start, stop))


@pytest.fixture(scope="module")
def actor(alone):
    config = parity.make_config(Mesh(), algo__kl__coef=0.1)
    actor = parity.build_actor(config, alone)
    actor.update(parity.shared_step(config, alone, parity.make_batch(), actor)[0])  # so that there are moments
    return actor


def test_one_process_writes_every_element_of_weights_moments_and_reference_once(actor):
    blocks = checkpoint_blocks(actor)
    assert all(block.is_written for block in blocks)
    counts = Counter()
    for block in blocks:
        kind = next((k for k in ("reference.", "optimizer.state.") if block.key.startswith(k)), "policy")
        name = ".".join(block.key.split(".")[: 3 if kind == "optimizer.state." else 0])
        counts[name or kind] += prod(block.data.shape)
    number = sum(parameter.numel() for parameter in actor.policy.parameters())
    assert counts["policy"] == counts["reference."] == number
    assert counts["optimizer.state.exp_avg"] == counts["optimizer.state.exp_avg_sq"] == number
    per_element = Counter((block.key, block.offsets) for block in blocks)
    assert set(per_element.values()) == {1}


def test_a_block_is_a_view_that_loading_can_overwrite(actor):
    """The layers' matrices are stacked: the whole tensor has one more dim, the layer."""
    key = "decoder.layers.self_attention.linear_proj.weight"
    blocks = [block for block in checkpoint_blocks(actor) if block.key == key]
    assert {block.offsets for block in blocks} == {(layer, 0, 0) for layer in range(parity.LAYERS)}
    assert {block.size for block in blocks} == {(parity.LAYERS, 64, 64)}
    (third,) = (block for block in blocks if block.offsets[0] == 2)
    third.data.fill_(7.0)
    assert actor.policy[0].get_parameter("decoder.layers.2.self_attention.linear_proj.weight").eq(7).all()
    assert not actor.policy[0].get_parameter("decoder.layers.1.self_attention.linear_proj.weight").eq(7).any()


def test_only_tensors_with_a_row_per_token_of_the_vocabulary_are_padded(actor):
    padded = {block.key for block in checkpoint_blocks(actor) if block.is_padded and "." in block.key}
    assert {key for key in padded if not key.startswith(("optimizer", "reference"))} == {
        "embedding.word_embeddings.weight",
        "output_layer.weight",
    }


def test_copies_share_the_writing_of_their_common_blocks():
    """Three copies of 7 x 5, 4 and 3 elements write 14 each; a slice of a distributed optimizer is its rank's alone."""
    whole = torch.arange(35.0).view(1, 7, 5), torch.arange(35.0, 39.0), torch.arange(39.0, 42.0)
    found = {}
    for copy in range(3):
        blocks = [
            CheckpointBlock("a", (2, 7, 5), (1, 0, 0), whole[0], True, False, copy, 3),
            CheckpointBlock("b", (4,), (0,), whole[1], True, False, copy, 3),
            CheckpointBlock("c", (3,), (0,), whole[2], True, False, copy, 3),
            CheckpointBlock("mine", (9,), (3 * copy,), torch.zeros(3), True, False),
            CheckpointBlock("norm", (9,), (0,), torch.zeros(9), False, False, copy, 3),
        ]
        found[copy] = [
            (b.key, b.offsets, tuple(b.data.shape), b.data.flatten().tolist()) for b in written_blocks(blocks)
        ]
    assert [[part[:3] for part in parts] for parts in found.values()] == [
        [("mine", (0,), (3,)), ("a", (1, 0, 0), (1, 2, 5)), ("a", (1, 2, 0), (1, 1, 4))],
        [("mine", (3,), (3,)), ("a", (1, 2, 4), (1, 1, 1)), ("a", (1, 3, 0), (1, 2, 5)), ("a", (1, 5, 0), (1, 1, 3))],
        [
            ("mine", (6,), (3,)),
            ("a", (1, 5, 3), (1, 1, 2)),
            ("a", (1, 6, 0), (1, 1, 5)),
            ("b", (0,), (4,)),
            ("c", (0,), (3,)),
        ],
    ]
    assert [value for parts in found.values() for part in parts[1:] for value in part[3]] == list(range(42))
