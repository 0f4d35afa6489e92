"""The zigzag layout by hand, against Megatron-core's slicing, and its inverse."""

import numpy as np
import pytest
import torch

from dapo_mcore.batch.context import pack_multiple, padded_length, undo_zigzag, zigzag_positions

LENGTHS = np.array([8, 24, 16])


@pytest.mark.parametrize(
    ("length", "context_parallel", "expected"), [(5, 1, 5), (0, 2, 0), (1, 2, 4), (8, 2, 8), (9, 4, 16)]
)
def test_padded_length(length, context_parallel, expected):
    assert padded_length(length, context_parallel) == expected
    assert padded_length(np.array([length]), context_parallel).tolist() == [expected]


def test_pack_multiple_serves_both_zigzag_and_sequence_parallel():
    assert [pack_multiple(*case) for case in [(1, 1), (1, 8), (2, 1), (2, 3), (4, 2)]] == [1, 8, 4, 12, 8]


def test_by_hand():
    lengths = np.array([4, 8])
    assert zigzag_positions(lengths, 2, 0).tolist() == [0, 3, 4, 5, 10, 11]
    assert zigzag_positions(lengths, 2, 1).tolist() == [1, 2, 6, 7, 8, 9]
    assert zigzag_positions(lengths, 1, 0).tolist() == list(range(12))


@pytest.mark.parametrize("context_parallel", [2, 4])
def test_same_as_megatron_slices_a_sequence(context_parallel):
    # get_batch_on_this_cp_rank: view as [2·CP, chunk], take chunks rank and 2·CP - 1 - rank
    chunks = torch.arange(16).view(2 * context_parallel, -1)
    for rank in range(context_parallel):
        expected = chunks[[rank, 2 * context_parallel - 1 - rank]].flatten()
        assert zigzag_positions(np.array([16]), context_parallel, rank).tolist() == expected.tolist()


@pytest.mark.parametrize("context_parallel", [1, 2, 4])
def test_undo_is_the_exact_inverse_for_numpy_and_torch(context_parallel):
    whole = np.random.default_rng(0).normal(size=(48, 3))
    held = [zigzag_positions(LENGTHS, context_parallel, rank) for rank in range(context_parallel)]
    np.testing.assert_array_equal(undo_zigzag([whole[p] for p in held], LENGTHS, context_parallel), whole)

    tensor = torch.from_numpy(whole).requires_grad_()
    restored = undo_zigzag([tensor[p] for p in held], LENGTHS, context_parallel)
    assert torch.equal(restored, tensor)
    slope = torch.randn_like(tensor)
    restored.backward(slope)
    assert torch.equal(tensor.grad, slope)


def test_causal_work_is_equal_on_every_rank():
    # a token at position p of its sequence attends to p + 1 tokens
    work = np.concatenate([np.arange(1, n + 1) for n in LENGTHS])
    assert len({work[zigzag_positions(LENGTHS, 4, rank)].sum() for rank in range(4)}) == 1


def test_unpadded_length_is_refused():
    with pytest.raises(AssertionError, match="multiples of 2·CP = 4"):
        zigzag_positions(np.array([6]), 2, 0)
