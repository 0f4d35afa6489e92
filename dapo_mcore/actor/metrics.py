"""Sums over loss tokens of one gradient step, added up over the mesh, and what they mean as metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.algo.correction import MismatchStats, mismatch_metrics, mismatch_stats
from dapo_mcore.kernels.policy_head import PolicyHeadOutput
from dapo_mcore.types import MicroBatch

SUMS = ("tokens", "loss", "nll", "entropy", "clip_low", "clip_high", "clip_dual", "ppo_kl", "ref_kl")
MAXIMA = ("ratio_max_deviation",)


def token_sums(output: PolicyHeadOutput, batch: MicroBatch) -> dict[str, torch.Tensor]:
    """One micro-batch's sums and maxima over this rank's loss rows, as fp64 vectors in the order of SUMS and MAXIMA;
    behind them, those of the distance to the rollout engine's log-probs (MismatchStats)."""
    new = output.logprobs.double()
    old_minus_new = new.new_zeros(new.shape) if batch.old_logprobs is None else (batch.old_logprobs.double() - new)
    sums = torch.stack(
        [
            new.new_tensor(float(new.numel())),
            output.loss.detach().double(),
            -new.sum(),
            output.entropy.double().sum(),
            output.clipped_low.double().sum(),
            output.clipped_high.double().sum(),
            output.clipped_dual.double().sum(),
            old_minus_new.sum(),
            output.kl.double().sum(),
        ]
    )
    deviation = (output.ratio.double() - 1).abs()
    largest = deviation.amax().view(1) if deviation.numel() else sums.new_zeros(1)
    mismatch = mismatch_stats(output.logprobs.float(), batch.rollout_logprobs)
    return {"sums": torch.cat([sums, mismatch.sums]), "maxima": torch.cat([largest, mismatch.maximum])}


@dataclass(frozen=True)
class UpdateSums:
    """One gradient step. `sums` and `maxima` are over every loss token of the mini-batch on all ranks.

    loss is the mini-batch's loss itself (a sum of already weighted terms); the others are sums to divide by tokens.
    `mismatch` compares the policy before this step with the rollout engine. `skipped` is True on all ranks where the
    gradient norm of any rank was not finite.
    """

    sums: dict[str, float]
    maxima: dict[str, float]
    mismatch: MismatchStats
    grad_norm: float
    lr: float
    skipped: bool

    @classmethod
    def reduce(
        cls, outcomes: Sequence[dict[str, torch.Tensor]], layout: Layout, *, grad_norm: float, lr: float
    ) -> UpdateSums:
        """Adds up the micro-batches of all ranks, and decides whether the step is skipped.

        Collectives: two small gloo all-reduces over the control group."""
        nothing = torch.zeros(0)
        empty = mismatch_stats(nothing, nothing)
        sums = torch.cat([torch.zeros(len(SUMS), dtype=torch.float64), empty.sums])
        maxima = torch.cat([torch.zeros(len(MAXIMA), dtype=torch.float64), empty.maximum])
        if layout.reports_loss:
            sums = torch.stack([out["sums"] for out in outcomes]).sum(0).cpu()
            maxima = torch.stack([out["maxima"] for out in outcomes]).amax(0).cpu()
        layout.sum_over_ranks(sums)
        maxima = torch.cat([maxima, maxima.new_tensor([not math.isfinite(grad_norm)])])
        layout.max_over_ranks(maxima)
        skipped = bool(maxima[-1])
        return cls(
            dict(zip(SUMS, sums.tolist())),
            dict(zip(MAXIMA, maxima.tolist())),
            MismatchStats(sums[len(SUMS) :], maxima[len(MAXIMA) : -1]),
            grad_norm=math.nan if skipped else grad_norm,
            lr=lr,
            skipped=skipped,
        )


def update_metrics(updates: Sequence[UpdateSums]) -> dict[str, float]:
    """`actor/…` metrics of one rollout step: token-weighted means over its gradient steps, maxima, the last lr."""
    tokens = max(1.0, sum(u.sums["tokens"] for u in updates))
    mean = {name: sum(u.sums[name] for u in updates) / tokens for name in SUMS if name not in ("tokens", "loss")}
    count = len(updates)
    return {
        "actor/loss": sum(u.sums["loss"] for u in updates) / count,
        **{f"actor/{name}": value for name, value in mean.items()},
        "actor/grad_norm": sum(u.grad_norm for u in updates) / count,
        "actor/lr": updates[-1].lr,
        "actor/ratio_max_deviation": max(u.maxima["ratio_max_deviation"] for u in updates),
        "actor/first_update_ratio_deviation": updates[0].maxima["ratio_max_deviation"],
        "actor/skipped_updates": float(sum(u.skipped for u in updates)),
        "updates_per_step": float(count),
        **mismatch_metrics(updates[0].mismatch),  # later gradient steps differ from the engine because they learned
    }
