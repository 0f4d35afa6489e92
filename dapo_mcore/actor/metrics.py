"""Statistics of a gradient step: sums over the loss tokens of all ranks, and the metrics made from them.

Change here: a metric of training. A sum goes into SUMS and micro_batch_stats, in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.actor.update_guard import Verdict
from dapo_mcore.algo.correction import UNCORRECTED, MismatchStats, mismatch_metrics, mismatch_stats
from dapo_mcore.config.algo import TISConfig
from dapo_mcore.kernels.policy_head import PolicyHeadOutput
from dapo_mcore.types import MicroBatch

SUMS = ("tokens", "loss", "nll", "entropy", "clip_low", "clip_high", "clip_dual", "ppo_kl", "ref_kl")
MAXIMA = ("ratio_max_deviation",)


def micro_batch_stats(output: PolicyHeadOutput, batch: MicroBatch, tis: TISConfig) -> dict[str, torch.Tensor]:
    """Return one micro-batch's sums and maxima over this rank's loss tokens, and their log-probs.

    {"sums": fp64 in the order of SUMS, then MismatchStats.sums, "maxima": fp64 in the order of MAXIMA, then
    MismatchStats.maximum, "logprobs": float32 [L], "inputs": fp64 scalar, finite only if the micro-batch's inputs are}
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
    used = UNCORRECTED if batch.tis_weights is not None else tis  # otherwise counted before the step
    mismatch = mismatch_stats(output.logprobs.float(), batch.rollout_logprobs, used)
    sums, maxima = torch.cat([sums, mismatch.sums]), torch.cat([largest, mismatch.maximum])
    return {"sums": sums, "maxima": maxima, "logprobs": output.logprobs, "inputs": _input_sum(batch)}


def _input_sum(batch: MicroBatch) -> torch.Tensor:
    """Return the sum of what the loss may clamp without a trace; infinite old log-probs are seen in `ppo_kl`."""
    inputs = (batch.advantages, batch.rollout_logprobs, batch.ref_logprobs)
    return torch.stack([values.double().sum() for values in inputs if values is not None]).sum()


@dataclass(frozen=True)
class UpdateStats:
    """Statistics of one gradient step over all loss tokens of the mini-batch, on all ranks.

    sums      by SUMS; `loss` is the mini-batch's loss (its terms are weighted already), the others are to be divided by `tokens`
    maxima    by MAXIMA
    mismatch  compares the policy before this step with the rollout engine
    grad_norm the norm before clipping, the largest of all ranks; NaN if anything was not finite on any rank
    verdict   what happens to the step, the same on every rank
    aux_loss  the load-balancing loss, mean over layers with experts and samples, without its coefficient; None if there is none
    logprobs  of this rank's micro-batches before this step, float32 [L] each; on last-stage ranks, empty elsewhere
    selection what actor/covariance_selection.py found; empty without it
    cause     which tensor was not finite first, for people; empty if all were
    """

    sums: dict[str, float]
    maxima: dict[str, float]
    mismatch: MismatchStats
    grad_norm: float
    lr: float
    verdict: Verdict = Verdict.TAKEN
    aux_loss: float | None = None
    logprobs: Sequence[torch.Tensor] = ()
    selection: Mapping[str, float] = field(default_factory=dict)
    cause: str = ""

    @property
    def skipped(self) -> bool:
        return self.verdict.skips

    @classmethod
    def reduce(
        cls,
        micro_batches: Sequence[dict[str, torch.Tensor]],
        layout: Layout,
        *,
        grad_norm: float,
        lr: float,
        judge: Callable[[float], Verdict],
        aux_loss: torch.Tensor | None = None,
    ) -> UpdateStats:
        """Add up the micro_batch_stats of all ranks, and let `judge` decide from the norm whether the step is skipped.

        `grad_norm` is NaN on a rank whose gradient is not finite. `judge` gets NaN on every rank if that, a sum or an input is not
        finite on any rank. A finite gradient alone proves nothing: the loss clamps ratios, so an infinite old log-prob has
        gradient 0. `aux_loss` is each rank's part of a sum over ranks.
        Collectives: two small gloo all-reduces over the control group.
        """
        own = _totals(micro_batches)
        aux = torch.zeros(1, dtype=torch.float64) if aux_loss is None else aux_loss.view(1).cpu()
        inputs = [torch.stack([stats["inputs"] for stats in micro_batches]).cpu()] if micro_batches else []
        finite = math.isfinite(grad_norm) and all(bool(values.isfinite().all()) for values in (*own, aux, *inputs))
        sums, maxima = own if layout.reports_loss else _totals(())
        sums = torch.cat([sums, aux])
        layout.sum_over_ranks(sums)
        # a maximum may lose a NaN, so the norm of a bad rank is 0 here and its flag 1
        maxima = torch.cat([maxima, maxima.new_tensor([grad_norm if finite else 0.0, not finite])])
        layout.max_over_ranks(maxima)
        norm = math.nan if maxima[-1] else float(maxima[-2])
        return cls(
            dict(zip(SUMS, sums.tolist())),
            dict(zip(MAXIMA, maxima.tolist())),
            MismatchStats(sums[len(SUMS) : -1], maxima[len(MAXIMA) : -2]),
            grad_norm=norm,
            lr=lr,
            verdict=judge(norm),
            aux_loss=None if aux_loss is None else float(sums[-1]),
            logprobs=[stats["logprobs"] for stats in micro_batches],
        )


def _totals(micro_batches: Sequence[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums and maxima over one rank's micro-batches, fp64 on the host; 0 if there are none."""
    if micro_batches:
        sums, maxima = (torch.stack([stats[name] for stats in micro_batches]) for name in ("sums", "maxima"))
        return sums.sum(0).cpu(), maxima.amax(0).cpu()
    none = mismatch_stats(torch.zeros(0), torch.zeros(0))
    zeros = (torch.zeros(len(names), dtype=torch.float64) for names in (SUMS, MAXIMA))
    sums, maxima = (torch.cat(pair) for pair in zip(zeros, (none.sums, none.maximum), strict=True))
    return sums, maxima


def update_metrics(updates: Sequence[UpdateStats], rest: MismatchStats | None = None) -> dict[str, float]:
    """Return the metrics of one rollout step. `actor/…`: token means and maxima over its gradient steps, and the last lr.

    rest  the mismatch of the policy before the step on the mini-batches after the first. The first one's is that of the
          first gradient step; later steps also differ because the policy has learned.
    Steps that were not finite are counted and otherwise left out, as long as there are others. Without any gradient step, as
    while only a critic trains, `updates_per_step` is all there is.
    """
    if not updates:
        return {"updates_per_step": 0.0}
    finite = [u for u in updates if u.verdict is not Verdict.NOT_FINITE] or updates
    tokens = max(1.0, sum(u.sums["tokens"] for u in finite))
    mean = {name: sum(u.sums[name] for u in finite) / tokens for name in SUMS if name not in ("tokens", "loss")}
    count = len(finite)
    aux_losses = [u.aux_loss for u in finite if u.aux_loss is not None]
    return {
        "actor/loss": sum(u.sums["loss"] for u in finite) / count,
        **{f"actor/{name}": value for name, value in mean.items()},
        "actor/grad_norm": sum(u.grad_norm for u in finite) / count,
        "actor/lr": updates[-1].lr,
        "actor/ratio_max_deviation": max(u.maxima["ratio_max_deviation"] for u in finite),
        "actor/first_update_ratio_deviation": updates[0].maxima["ratio_max_deviation"],
        "actor/skipped_updates": float(sum(u.verdict is Verdict.NOT_FINITE for u in updates)),
        "actor/skipped_spikes": float(sum(u.verdict is Verdict.SPIKE for u in updates)),
        **({"actor/moe_aux_loss": sum(aux_losses) / count} if aux_losses else {}),
        **{name: sum(u.selection[name] for u in finite) / count for name in finite[0].selection},
        "updates_per_step": float(len(updates)),
        **mismatch_metrics(_mismatch(updates[0], rest)),
    }


def _mismatch(first: UpdateStats, rest: MismatchStats | None) -> MismatchStats:
    """Return the mismatch before the rollout step, without that of a first gradient step that was not finite."""
    if rest is None:
        return first.mismatch
    return rest if first.verdict is Verdict.NOT_FINITE else first.mismatch + rest
