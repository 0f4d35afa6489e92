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

POSITIONS = 2**24
"""More than the positions of any sequence. With it, sample and position fit exactly into one fp64 number."""


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
    with_sequences: bool = False,
) -> MicroBatch:
    """Return the micro-batch of the given samples of `batch` for `context_rank`, as CPU tensors; see MicroBatch for shapes.

    advantages, weights  float64 [B], one per sample of the batch, used for each of its loss tokens.
    balance_weights      float64 [B], see MicroBatch; None without a load-balancing loss.
    with_sequences       fill in row_sequences.
    tensor_multiple      divides a rank's number of tokens: TP with sequence parallelism, else 1.
    packing              True: sequences back to back, each padded to 2·CP, and a dummy sequence at the end if alignment
                         needs it, with a boundary in cu_seqlens. False: a right-padded rectangle.
    pad_token            fills a micro-batch without samples. Other pads repeat the longest sample, see `_tokens`.

    Position t predicts token t + 1, so a row is at t if the loss mask is set at t + 1. Without samples, return the
    smallest micro-batch that runs (no rows): a rank without work must still join its peers' collectives.
    Example: tokens [5, 6, 7], mask [F, F, T], CP 1: rows [1], targets [7].
    """
    samples = np.asarray(samples, dtype=np.int64)
    starts = batch.offsets[samples]
    lengths = batch.offsets[samples + 1] - starts
    multiple = pack_multiple(context_parallel, tensor_multiple)
    segments = _packed(lengths, context_parallel, multiple) if packing else _rectangle(lengths, multiple)
    begins = np.cumsum(segments) - segments
    spans = [slice(begin, begin + length) for begin, length in zip(starts.tolist(), lengths.tolist())]

    tokens = _tokens(batch.tokens, spans, segments, pad_token)
    held = zigzag_positions(segments, context_parallel, context_rank)
    num_rows = 1 if packing else len(segments)
    trained = np.flatnonzero(_joined(batch.loss_mask, spans))
    ends = np.cumsum(lengths)
    counts = np.diff(np.searchsorted(trained, ends), prepend=0)
    place = trained + np.repeat(begins[: len(samples)] - (ends - lengths), counts)
    rows, mine = _rows(place - 1, held, len(tokens), num_rows)
    row_sequences = np.repeat(np.arange(len(samples)), counts)[mine]
    sample_ids = samples[row_sequences]
    position_ids = ragged_ranges(np.zeros_like(segments), segments)
    balance: dict[str, torch.Tensor] = {}
    if balance_weights is not None:
        owners = _owners(lengths, segments)
        balance["sequence_ids"] = torch.from_numpy(owners[held].reshape(num_rows, -1))
        balance["balance_weights"] = torch.from_numpy(balance_weights[samples].astype(np.float32))
    return MicroBatch(
        tokens=torch.from_numpy(tokens[held].reshape(num_rows, -1)),
        position_ids=torch.from_numpy(position_ids[held].reshape(num_rows, -1)),
        cu_seqlens=torch.from_numpy(np.append(begins, len(tokens)).astype(np.int32)) if packing else None,
        lengths=segments,
        rows=torch.from_numpy(rows),
        targets=torch.from_numpy(tokens[place[mine]]),
        advantages=torch.from_numpy(advantages[sample_ids].astype(np.float32)),
        token_weights=torch.from_numpy(weights[sample_ids].astype(np.float32)),
        rollout_logprobs=torch.from_numpy(_joined(batch.rollout_logprobs, spans)[trained[mine]]),
        sample_ids=torch.from_numpy(sample_ids),
        row_sequences=torch.from_numpy(row_sequences) if with_sequences else None,
        **balance,
    )


def token_places(micro: MicroBatch) -> torch.Tensor:
    """Return int64 [L], a number for each row that is its token's alone in the rollout step, the same on any layout: larger for
    later samples, and for later tokens of a sample."""
    device = micro.sample_ids.device
    positions = micro.position_ids.T.flatten().to(device)[micro.rows.to(device)]  # rows count hidden states [s, b]
    return micro.sample_ids * POSITIONS + positions


def _joined(flat: np.ndarray, spans: Sequence[slice]) -> np.ndarray:
    """Return the slices of `flat` back to back. Slices, because an index per token takes several times as long."""
    return np.concatenate([flat[:0], *(flat[span] for span in spans)])


def _tokens(flat: np.ndarray, spans: Sequence[slice], segments: np.ndarray, pad_token: int) -> np.ndarray:
    """Return int64 [Σ segments], each sample's tokens with its pads: the longest sample's tokens at the same positions.

    No loss reads a pad, but a scale of FP8 covers all tokens of its tile, pads too. So pads look like the pack's own tokens:
    a dummy is the beginning of its longest sample, and does not raise a scale per tensor.
    """
    longest = max((flat[span] for span in spans), key=len, default=np.array([pad_token]))
    pads = np.resize(longest, segments.max())  # repeated if it is too short
    samples = [flat[span] for span in spans] + [flat[:0]] * (len(segments) - len(spans))
    parts = [part for own, length in zip(samples, segments.tolist()) for part in (own, pads[len(own) : length])]
    return np.concatenate(parts, dtype=np.int64)


def _owners(lengths: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Return int64 [Σ segments], which of the n samples each position belongs to; n for a pad."""
    own, numbers = np.zeros_like(segments), np.arange(len(segments))
    own[: len(lengths)] = lengths
    pads = np.full_like(numbers, len(lengths))
    return np.repeat(np.stack([numbers, pads], axis=1).ravel(), np.stack([own, segments - own], axis=1).ravel())


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


def _rows(
    predicting: np.ndarray, held: np.ndarray, num_tokens: int, num_rows: int
) -> tuple[np.ndarray, np.ndarray | slice]:
    """Return rows of the flattened hidden states [s, b, H], and the index of the entries of `predicting` that this rank has.

    predicting, held  positions in the whole micro-batch, sequences one after the other.
    """
    if len(held) == num_tokens:
        index, mine = predicting, slice(None)
    else:
        local = np.full(num_tokens, -1, dtype=np.int64)
        local[held] = np.arange(len(held))
        index = local[predicting]
        mine = np.flatnonzero(index >= 0)
        index = index[mine]
    if num_rows == 1:
        return index, mine
    row, position = np.divmod(index, len(held) // num_rows)
    return position * num_rows + row, mine
