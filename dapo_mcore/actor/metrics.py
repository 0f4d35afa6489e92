"""Statistics of a gradient step: sums over the loss tokens of all ranks, and the metrics made from them.

Change here: a metric of training. A sum goes into SUMS and micro_batch_stats, in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.algo.correction import MismatchStats, mismatch_metrics, mismatch_stats
from dapo_mcore.config.sections import TISConfig
from dapo_mcore.kernels.policy_head import PolicyHeadOutput
from dapo_mcore.types import MicroBatch

SUMS = ("tokens", "loss", "nll", "entropy", "clip_low", "clip_high", "clip_dual", "ppo_kl", "ref_kl")
MAXIMA = ("ratio_max_deviation",)


def micro_batch_stats(output: PolicyHeadOutput, batch: MicroBatch, tis: TISConfig) -> dict[str, torch.Tensor]:
    """Return one micro-batch's sums and maxima over this rank's loss tokens, and their log-probs.

    {"sums": fp64 in the order of SUMS, then MismatchStats.sums, "maxima": fp64 in the order of MAXIMA, then
    MismatchStats.maximum, "logprobs": float32 [L]}
    """
    new = output.logprobs.double()
    old_minus_new = new.new_zeros(new.shape) if batch.old_logprobs is None else (batch.old_logprobs.double() - new)
    sums = torch.stack(
        [
            new.new_full((), new.numel()),
            output.loss.detach().double(),
            -new.sum(),
            output.entropy.double().sum(),
            output.clipped_low.sum(dtype=torch.float64),
            output.clipped_high.sum(dtype=torch.float64),
            output.clipped_dual.sum(dtype=torch.float64),
            old_minus_new.sum(),
            output.kl.double().sum(),
        ]
    )
    deviation = (output.ratio.double() - 1).abs()
    largest = deviation.amax().view(1) if deviation.numel() else sums.new_zeros(1)
    mismatch = mismatch_stats(output.logprobs.float(), batch.rollout_logprobs, tis.mode, tis.cap)
    sums, maxima = torch.cat([sums, mismatch.sums]), torch.cat([largest, mismatch.maximum])
    return {"sums": sums, "maxima": maxima, "logprobs": output.logprobs}


@dataclass(frozen=True)
class UpdateStats:
    """Statistics of one gradient step over all loss tokens of the mini-batch, on all ranks.

    sums      by SUMS; `loss` is the mini-batch's loss (its terms are weighted already), the others are to be divided by `tokens`
    maxima    by MAXIMA
    mismatch  compares the policy before this step with the rollout engine
    skipped   True, on every rank, if the gradient norm was not finite on any rank
    aux_loss  the load-balancing loss, mean over layers with experts and samples, without its coefficient; None if there is none
    logprobs  of this rank's micro-batches before this step, float32 [L] each; on last-stage ranks, empty elsewhere
    """

    sums: dict[str, float]
    maxima: dict[str, float]
    mismatch: MismatchStats
    grad_norm: float
    lr: float
    skipped: bool
    aux_loss: float | None = None
    logprobs: Sequence[torch.Tensor] = ()

    @classmethod
    def reduce(
        cls,
        micro_batches: Sequence[dict[str, torch.Tensor]],
        layout: Layout,
        *,
        grad_norm: float,
        lr: float,
        aux_loss: torch.Tensor | None = None,
    ) -> UpdateStats:
        """Add up the micro_batch_stats of all ranks, and decide whether the step is skipped.

        `grad_norm` is NaN on a rank whose gradient is not finite. `aux_loss` is each rank's part of a sum over ranks.
        Collectives: two small gloo all-reduces over the control group.
        """
        nothing = torch.zeros(0)
        empty = mismatch_stats(nothing, nothing)
        sums = torch.cat([torch.zeros(len(SUMS), dtype=torch.float64), empty.sums])
        maxima = torch.cat([torch.zeros(len(MAXIMA), dtype=torch.float64), empty.maximum])
        if layout.reports_loss:
            sums = torch.stack([stats["sums"] for stats in micro_batches]).sum(0).cpu()
            maxima = torch.stack([stats["maxima"] for stats in micro_batches]).amax(0).cpu()
        sums = torch.cat([sums, torch.zeros(1, dtype=sums.dtype) if aux_loss is None else aux_loss.view(1).cpu()])
        layout.sum_over_ranks(sums)
        maxima = torch.cat([maxima, maxima.new_tensor([not math.isfinite(grad_norm)])])
        layout.max_over_ranks(maxima)
        skipped = bool(maxima[-1])
        return cls(
            dict(zip(SUMS, sums.tolist())),
            dict(zip(MAXIMA, maxima.tolist())),
            MismatchStats(sums[len(SUMS) : -1], maxima[len(MAXIMA) : -1]),
            grad_norm=math.nan if skipped else grad_norm,
            lr=lr,
            skipped=skipped,
            aux_loss=None if aux_loss is None else float(sums[-1]),
            logprobs=[stats["logprobs"] for stats in micro_batches],
        )


def update_metrics(updates: Sequence[UpdateStats], rest: MismatchStats | None = None) -> dict[str, float]:
    """Return the metrics of one rollout step. `actor/…`: token means and maxima over its gradient steps, and the last lr.

    rest  the mismatch of the policy before the step on the mini-batches after the first. The first one's is that of the
          first gradient step; later steps also differ because the policy has learned.
    """
    tokens = max(1.0, sum(u.sums["tokens"] for u in updates))
    mean = {name: sum(u.sums[name] for u in updates) / tokens for name in SUMS if name not in ("tokens", "loss")}
    count = len(updates)
    aux_losses = [u.aux_loss for u in updates if u.aux_loss is not None]
    return {
        "actor/loss": sum(u.sums["loss"] for u in updates) / count,
        **{f"actor/{name}": value for name, value in mean.items()},
        "actor/grad_norm": sum(u.grad_norm for u in updates) / count,
        "actor/lr": updates[-1].lr,
        "actor/ratio_max_deviation": max(u.maxima["ratio_max_deviation"] for u in updates),
        "actor/first_update_ratio_deviation": updates[0].maxima["ratio_max_deviation"],
        "actor/skipped_updates": float(sum(u.skipped for u in updates)),
        **({"actor/moe_aux_loss": sum(aux_losses) / count} if aux_losses else {}),
        "updates_per_step": float(count),
        **mismatch_metrics(updates[0].mismatch if rest is None else updates[0].mismatch + rest),
    }
