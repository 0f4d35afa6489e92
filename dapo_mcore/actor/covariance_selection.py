"""The tokens of a mini-batch that KL-Cov and Clip-Cov treat otherwise, chosen over all ranks: the same ones on any layout.

Change here: how they are found without bringing the tokens together. Who is a candidate is algo/covariance.py's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.algo.covariance import ascending_keys, candidates, covariances, drawn_keys, num_selected
from dapo_mcore.batch.microbatch import token_places
from dapo_mcore.config.algo import AlgoConfig
from dapo_mcore.types import MicroBatch

_DIGIT = 16
"""Bits of a key that one pass over the ranks finds."""


def with_selection(
    micro_batches: Sequence[MicroBatch], logprobs: Sequence[Tensor], draw: int, algo: AlgoConfig, layout: Layout
) -> tuple[list[MicroBatch], dict[str, float]]:
    """Return a mini-batch's micro-batches with `policy_mask` or `old_kl_coefs`, and metrics over all ranks.

    logprobs  float32 [L] of each micro-batch: the policy's with the weights that the gradient step changes. They become the old ones
              of a micro-batch that has none. An empty list before the last stage, whose micro-batches are returned as they are.
    draw      number of Clip-Cov's draw, a gradient step's.
    Rejected tokens, whose token weight is 0, are no candidates and count nowhere. Collectives: 2 to 12 gloo all-reduces.
    """
    scored = [
        micro if micro.old_logprobs is not None else micro.with_(old_logprobs=own)
        for micro, own in zip(micro_batches, logprobs)
    ]
    own, advantages, ratios, places, counts = _rows(scored, logprobs, algo)
    reporting = slice(None) if layout.reports_loss else slice(0)
    counted = counts[reporting]
    sums = [counted.sum(), own[reporting][counted].sum(), advantages[reporting][counted].sum()]
    total, logprob_sum, advantage_sum = layout.sum_over_ranks(torch.tensor(sums, dtype=torch.float64)).tolist()
    total = max(int(total), 1)
    covariance = covariances(own, advantages, logprob_sum / total, advantage_sum / total)
    may = candidates(algo, covariance, ratios, advantages) & counts
    settings = algo.kl_cov if algo.policy_loss == "kl_cov" else algo.clip_cov
    keys = ascending_keys(covariance) if algo.policy_loss == "kl_cov" else drawn_keys(places, draw)
    selected = largest(keys, places, may, num_selected(settings.ratio, total), layout)
    found = torch.tensor([selected[reporting].sum(), covariance[reporting][counted].sum()], dtype=torch.float64)
    num, covariance_sum = layout.sum_over_ranks(found).tolist()
    metrics = {"actor/covariance": covariance_sum / total, "actor/covariance_selected": num / total}
    return _applied(scored, selected, algo) if layout.is_last_stage else list(micro_batches), metrics


def largest(keys: np.ndarray, places: np.ndarray, may: np.ndarray, number: int, layout: Layout) -> np.ndarray:
    """Return bool [L], True for the `number` candidates with the largest keys over all ranks; all of them if there are fewer. Of
    equal keys the lowest places are taken.

    keys    uint64 [L]. places  int64 [L], see token_places. may  bool [L], which rows are candidates.
    Every rank must call it with rows of its own; those of one replica's tensor-parallel ranks are equal, and count once.
    """
    edge, above = _edge(keys[may], number, layout)
    chosen = may & (keys > edge)
    level = may & (keys == edge)
    if above < number:
        inverted = ~places.astype(np.uint64)
        last, _ = _edge(inverted[level], number - above, layout)
        chosen |= level & (inverted >= last)
    return chosen


def _edge(keys: np.ndarray, number: int, layout: Layout) -> tuple[np.uint64, int]:
    """Return the key of rank `number` over all ranks, counted from the largest, and how many keys are larger: found digit by digit,
    from the highest. With fewer keys, return 0 and the number of those above it. Collectives: four all-reduces of 2^16 numbers."""
    own = keys if layout.reports_loss else keys[:0]
    prefix, above = 0, 0
    for shift in range(64 - _DIGIT, -1, -_DIGIT):
        fits = own >> np.uint64(shift + _DIGIT) == prefix if shift + _DIGIT < 64 else np.ones(len(own), bool)
        digits = (own[fits] >> np.uint64(shift)) & np.uint64(2**_DIGIT - 1)
        counts = torch.from_numpy(np.bincount(digits.astype(np.int64), minlength=2**_DIGIT).astype(np.int64))
        counts = layout.sum_over_ranks(counts).numpy()
        larger = counts[::-1].cumsum()[::-1] - counts  # with a larger digit
        reached = np.flatnonzero(above + larger + counts >= number)
        digit = int(reached[-1]) if len(reached) else 0
        above += int(larger[digit])
        prefix = prefix << _DIGIT | digit
    return np.uint64(prefix), above


def _rows(
    scored: Sequence[MicroBatch], logprobs: Sequence[Tensor], algo: AlgoConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return of all rows, [L] each: log-probs, advantages and log-ratios in fp64, places, and whether they count."""

    def joined(parts: Sequence[Tensor], dtype: torch.dtype) -> np.ndarray:
        return torch.cat([torch.zeros(0, dtype=dtype), *(part.to("cpu", dtype) for part in parts)]).numpy()

    own = joined(logprobs, torch.float64)
    from_engine = algo.old_logprobs == "rollout"
    old = joined([micro.rollout_logprobs if from_engine else micro.old_logprobs for micro in scored], torch.float64)
    advantages = joined([micro.advantages for micro in scored], torch.float64)
    places = joined([token_places(micro) for micro in scored], torch.int64)
    counts = joined([micro.token_weights for micro in scored], torch.float64) > 0
    return own, advantages, own - old, places, counts


def _applied(scored: Sequence[MicroBatch], selected: np.ndarray, algo: AlgoConfig) -> list[MicroBatch]:
    parts = torch.from_numpy(selected).split([len(micro.rows) for micro in scored])
    if algo.policy_loss == "kl_cov":
        return [micro.with_(old_kl_coefs=algo.kl_cov.coef * part.float()) for micro, part in zip(scored, parts)]
    return [micro.with_(policy_mask=(~part).float()) for micro, part in zip(scored, parts)]
