"""Importance weights and rejection of a rollout step, where a token's depend on others: computed once, before the gradient steps.

Change here: how the tokens of a sample or step, which many ranks hold, are brought together. The formulas are in
algo/correction.py and algo/rejection.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.algo.correction import (
    LOG_RATIO_LIMIT,
    importance_metrics,
    importance_sums_of,
    weights_of,
)
from dapo_mcore.algo.rejection import rejected, sample_sums
from dapo_mcore.config.algo import AlgoConfig
from dapo_mcore.types import MicroBatch


@dataclass(frozen=True)
class Corrections:
    """The corrections of a rollout step.

    tis_weights  float32 [L] of each micro-batch; None without algo.tis. An empty list before the last stage, as `rejected`.
    rejected     bool [L] of each micro-batch.
    num_kept     int64 [B], loss tokens of each sample that are not rejected, on every rank.
    metrics      `tis/…` and `rejection/…` over all ranks, on every rank.
    """

    tis_weights: list[Tensor | None]
    rejected: list[Tensor]
    num_kept: Tensor
    metrics: dict[str, float]


def find_corrections(
    micro_batches: Sequence[MicroBatch], num_loss_tokens: Tensor, algo: AlgoConfig, layout: Layout
) -> Corrections:
    """Return the corrections of a rollout step from old and rollout log-probs of all its micro-batches.

    num_loss_tokens  int64 [B] of all samples of the step.
    Sums over a sample are exact for any layout: every rank adds up what it holds, in fp64.
    Collectives: a gloo all-reduce of [B] per criterion and one for rejected tokens; one for weights by response, and two small ones.
    """
    scored = [micro for micro in micro_batches if layout.is_last_stage]
    rows = [(_log_ratios(micro), micro.sample_ids.cpu()) for micro in scored]
    outside, num_rejected = _reject(rows, num_loss_tokens, algo, layout)
    weights, metrics = _weigh(rows, num_loss_tokens, algo, layout)
    if algo.rejection:
        metrics |= _rejection_metrics(num_rejected, num_loss_tokens)
    return Corrections(weights, outside, num_loss_tokens - num_rejected, metrics)


def _log_ratios(micro: MicroBatch) -> Tensor:
    """Return log π_actor - log π_engine of each row, fp64 [L] in host memory, clamped to ±20."""
    found = micro.old_logprobs.double().cpu() - micro.rollout_logprobs.double().cpu()
    return found.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def _reject(
    rows: Sequence[tuple[Tensor, Tensor]], num_loss_tokens: Tensor, algo: AlgoConfig, layout: Layout
) -> tuple[list[Tensor], Tensor]:
    """Return the rejected rows of each micro-batch, and how many each sample has over all ranks, int64 [B]."""
    found = [torch.zeros(len(ids), dtype=torch.bool) for _, ids in rows]
    for criterion in algo.rejection:
        sums = torch.zeros(len(num_loss_tokens), dtype=torch.float64)
        if criterion.level != "token":
            for log_ratios, ids in rows if layout.reports_loss else ():
                sums += sample_sums(criterion, log_ratios, ids, len(sums))
            layout.sum_over_ranks(sums)
        for out, (log_ratios, ids) in zip(found, rows, strict=True):
            out |= rejected(criterion, log_ratios, ids, sums, num_loss_tokens)
    counts = torch.zeros_like(num_loss_tokens)
    if algo.rejection:
        for out, (_, ids) in zip(found, rows) if layout.reports_loss else ():
            counts.index_add_(0, ids, out.long())
        layout.sum_over_ranks(counts)
    return found, counts


def _weigh(
    rows: Sequence[tuple[Tensor, Tensor]], num_loss_tokens: Tensor, algo: AlgoConfig, layout: Layout
) -> tuple[list[Tensor | None], dict[str, float]]:
    """Return the weights of each micro-batch's rows, and their metrics over all loss tokens, rejected ones too."""
    tis = algo.tis
    if tis.mode == "off":
        return [None for _ in rows], {}
    levels = [log_ratios for log_ratios, _ in rows]
    of_samples = torch.zeros(len(num_loss_tokens), dtype=torch.float64)
    if tis.level != "token":
        for log_ratios, ids in rows if layout.reports_loss else ():
            of_samples.index_add_(0, ids, log_ratios)
        layout.sum_over_ranks(of_samples)
        if tis.level == "geometric":
            of_samples /= num_loss_tokens.clamp(min=1)
        of_samples.clamp_(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        levels = [of_samples.index_select(0, ids) for _, ids in rows]
    weights = [weights_of(level, tis) for level in levels]
    counted = torch.cat([*levels, of_samples[:0]]) if layout.reports_loss else of_samples[:0]
    # what is not finite does not count, so that only its own mini-batch is skipped
    sums = importance_sums_of(counted[counted.isfinite()], tis)
    metrics = importance_metrics(layout.sum_over_ranks(sums))
    if tis.normalize and metrics:
        mean = metrics["tis/weight_mean_after"]
        if tis.level != "token":
            each = weights_of(of_samples[num_loss_tokens > 0], tis)
            mean = float(each[each.isfinite()].mean())
        metrics["tis/norm_factor"] = mean = mean if mean > 1e-8 else 1.0
        weights = [own / mean for own in weights]
    return [own.float() for own in weights], metrics


def _rejection_metrics(num_rejected: Tensor, num_loss_tokens: Tensor) -> dict[str, float]:
    tokens, samples = int(num_loss_tokens.sum()), int((num_loss_tokens > 0).sum())
    whole = (num_rejected == num_loss_tokens) & (num_loss_tokens > 0)
    return {
        "rejection/tokens": int(num_rejected.sum()) / max(tokens, 1),
        "rejection/responses": int(whole.sum()) / max(samples, 1),
    }
