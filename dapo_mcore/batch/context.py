"""The zigzag split of context parallelism, for single or packed sequences.

Change here: which positions a context-parallel rank has. The split is that of Megatron-core's
`get_batch_on_this_cp_rank` and Transformer Engine's `thd_get_partitioned_indices`: a sequence has 2·CP equal chunks, and
rank r gets chunks r and 2·CP - 1 - r, so that causal attention costs every rank the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch

from dapo_mcore.batch.ragged import ragged_ranges

Length = TypeVar("Length", int, np.ndarray)
Array = TypeVar("Array", np.ndarray, torch.Tensor)


def sequence_multiple(context_parallel: int) -> int:
    """Return the number that must divide a sequence's length: 2·CP, or 1 without context parallelism."""
    return 2 * context_parallel if context_parallel > 1 else 1


def pack_multiple(context_parallel: int, tensor_multiple: int) -> int:
    """Return the number that must divide a pack's length, so that `tensor_multiple` divides each rank's share."""
    return math.lcm(sequence_multiple(context_parallel), context_parallel * tensor_multiple)


def round_up(length: Length, multiple: int) -> Length:
    """Return the smallest multiple of `multiple` that is at least `length` (tokens)."""
    return -(-length // multiple) * multiple


def padded_length(length: Length, context_parallel: int) -> Length:
    """Return a sequence's length in tokens after padding for the zigzag; int or int64 array."""
    return round_up(length, sequence_multiple(context_parallel))


def zigzag_positions(padded_lengths: np.ndarray, context_parallel: int, rank: int) -> np.ndarray:
    """Return int64 [Σ lengths / CP], the positions of the whole pack that `rank` has, in its order.

    padded_lengths  int64 [n], multiples of 2·CP; each sequence is split separately.
    Example: one sequence of 8 over CP 2 gives rank 0 [0, 1, 6, 7] and rank 1 [2, 3, 4, 5].
    """
    lengths = np.asarray(padded_lengths, dtype=np.int64)
    if context_parallel == 1:
        return np.arange(int(lengths.sum()), dtype=np.int64)
    chunk, rest = np.divmod(lengths, 2 * context_parallel)
    assert not rest.any(), f"lengths {lengths[rest > 0]} are not multiples of 2·CP = {2 * context_parallel}"
    begin = np.cumsum(lengths) - lengths
    mine = np.array([rank, 2 * context_parallel - 1 - rank])
    return ragged_ranges((begin[:, None] + chunk[:, None] * mine).ravel(), np.repeat(chunk, 2))


def undo_zigzag(parts: Sequence[Array], padded_lengths: np.ndarray, context_parallel: int) -> Array:
    """Return the whole pack [Σ lengths, …] from the ranks' shares [Σ lengths / CP, …] in rank order; numpy or torch.

    This is the inverse of indexing with `zigzag_positions`, and differentiable for tensors.
    """
    held = [zigzag_positions(padded_lengths, context_parallel, rank) for rank in range(context_parallel)]
    where = np.argsort(np.concatenate(held))
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(list(parts))[torch.from_numpy(where).to(parts[0].device)]
    return np.concatenate(parts)[where]
