"""The tensors of one forward pass on one context-parallel rank.

Change here: how samples are laid out in a micro-batch, and which positions predict a loss token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dapo_mcore.batch.context import pack_multiple, padded_length, round_up, zigzag_positions
from dapo_mcore.batch.ragged import ragged_ranges
from dapo_mcore.types import MicroBatch, TrainBatch


def build_micro_batch(
    batch: TrainBatch,
    samples: Sequence[int] | np.ndarray,
    *,
    advantages: np.ndarray,
    weights: np.ndarray,
    context_parallel: int,
    context_rank: int,
    tensor_multiple: int,
    packing: bool,
    pad_token: int,
    balance_weights: np.ndarray | None = None,
) -> MicroBatch:
    """Return the micro-batch of the given samples of `batch` for `context_rank`, as CPU tensors; see MicroBatch for shapes.

    advantages, weights  float64 [B], one per sample of the batch, used for each of its loss tokens.
    balance_weights      float64 [B], see MicroBatch; None without a load-balancing loss.
    tensor_multiple      divides a rank's number of tokens: TP with sequence parallelism, else 1.
    packing              True: sequences back to back, each padded to 2·CP, and a dummy sequence at the end if alignment
                         needs it, with a boundary in cu_seqlens. False: a right-padded rectangle.
    pad_token            fills a micro-batch without samples. Other pads repeat the longest sample, see `_pads`.

    Position t predicts token t + 1, so a row is at t if the loss mask is set at t + 1. Without samples, return the
    smallest micro-batch that runs (no rows): a rank without work must still join its peers' collectives.
    Example: tokens [5, 6, 7], mask [F, F, T], CP 1: rows [1], targets [7].
    """
    samples = np.asarray(samples, dtype=np.int64)
    lengths = batch.lengths[samples]
    multiple = pack_multiple(context_parallel, tensor_multiple)
    segments = _packed(lengths, context_parallel, multiple) if packing else _rectangle(lengths, multiple)
    begins = np.cumsum(segments) - segments

    source = ragged_ranges(batch.offsets[samples], lengths)
    place = ragged_ranges(begins[: len(samples)], lengths)
    position_ids = ragged_ranges(np.zeros_like(segments), segments)
    tokens = _pads(batch, samples, position_ids, pad_token)
    tokens[place] = batch.tokens[source]

    held = zigzag_positions(segments, context_parallel, context_rank)
    num_rows = 1 if packing else len(segments)
    trained = batch.loss_mask[source]
    rows, mine = _rows(place[trained] - 1, held, len(tokens), num_rows)
    source = source[trained][mine]
    sample_ids = np.repeat(samples, lengths)[trained][mine]
    balance: dict[str, torch.Tensor] = {}
    if balance_weights is not None:
        owners = np.full(len(tokens), len(samples))
        owners[place] = np.repeat(np.arange(len(samples)), lengths)  # the rest are pads
        balance["sequence_ids"] = torch.from_numpy(owners[held].reshape(num_rows, -1))
        balance["balance_weights"] = torch.from_numpy(balance_weights[samples].astype(np.float32))
    return MicroBatch(
        tokens=torch.from_numpy(tokens[held].reshape(num_rows, -1)),
        position_ids=torch.from_numpy(position_ids[held].reshape(num_rows, -1)),
        cu_seqlens=torch.from_numpy(np.append(begins, len(tokens)).astype(np.int32)) if packing else None,
        lengths=segments,
        rows=torch.from_numpy(rows),
        targets=torch.from_numpy(batch.tokens[source].astype(np.int64)),
        advantages=torch.from_numpy(advantages[sample_ids].astype(np.float32)),
        token_weights=torch.from_numpy(weights[sample_ids].astype(np.float32)),
        rollout_logprobs=torch.from_numpy(batch.rollout_logprobs[source]),
        sample_ids=torch.from_numpy(sample_ids),
        **balance,
    )


def _pads(batch: TrainBatch, samples: np.ndarray, position_ids: np.ndarray, pad_token: int) -> np.ndarray:
    """Return int64 [T], the token that each position has if it is a pad: the longest sample's token at the same position.

    No loss reads a pad, but a scale of FP8 covers all tokens of its tile, pads too. So pads look like the pack's own tokens:
    a dummy is the beginning of its longest sample, and does not raise a scale per tensor.
    """
    if not len(samples):
        return np.full(len(position_ids), pad_token, dtype=np.int64)
    longest = samples[np.argmax(batch.lengths[samples])]
    tokens = batch.tokens[batch.offsets[longest] : batch.offsets[longest + 1]]
    return tokens[position_ids % len(tokens)].astype(np.int64)


def _packed(lengths: np.ndarray, context_parallel: int, multiple: int) -> np.ndarray:
    """Return int64 [n] or [n + 1], the padded length of each sequence and of the dummy that aligns the pack."""
    padded = padded_length(lengths, context_parallel)
    total = int(padded.sum())
    dummy = round_up(max(total, 1), multiple) - total
    return np.append(padded, dummy) if dummy else padded


def _rectangle(lengths: np.ndarray, multiple: int) -> np.ndarray:
    """Return int64 [max(n, 1)], the same padded length for every sequence."""
    longest = int(lengths.max(initial=1))
    return np.full(max(len(lengths), 1), round_up(longest, multiple), dtype=np.int64)


def _rows(predicting: np.ndarray, held: np.ndarray, num_tokens: int, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of the flattened hidden states [s, b, H], and bool: which entries of `predicting` this rank has.

    predicting, held  positions in the whole micro-batch, sequences one after the other.
    """
    local = np.full(num_tokens, -1, dtype=np.int64)
    local[held] = np.arange(len(held))
    index = local[predicting]
    mine = index >= 0
    row, position = np.divmod(index[mine], len(held) // num_rows)
    return position * num_rows + row, mine
