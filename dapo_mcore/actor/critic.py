"""The critic on this rank (PPO): it values micro-batches and takes gradient steps of its own, over the actor's layout.

    micro-batches → score (values before the rollout step) → update (one gradient step per mini-batch) → statistics

Change here: the critic's forward pass and its statistics. Its loss is in algo/gae.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from dapo_mcore.actor.forward_backward import MicroBatchOutput, run_micro_batches
from dapo_mcore.actor.model.policy import VALUE_HEAD, Policy, PolicyModel, ValueModel, build_policy
from dapo_mcore.actor.not_finite import explain_skip, find_culprit, weights_lost
from dapo_mcore.actor.optimizer import Optimizer
from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.actor.param_gather import gather_parameters
from dapo_mcore.actor.update_guard import UpdateGuard, Verdict
from dapo_mcore.actor.wrap import wrap
from dapo_mcore.algo.gae import value_loss
from dapo_mcore.architecture.mapping import WeightReader
from dapo_mcore.architecture.shape import WeightShape
from dapo_mcore.batch.feeder import build_feeder
from dapo_mcore.config.schema import Config
from dapo_mcore.errors import TrainingError
from dapo_mcore.types import MicroBatch

SUMS = ("tokens", "loss", "value", "return", "return_squared", "error_squared", "clipped")


class Critic:
    """One rank's part of the value model and its optimizer."""

    def __init__(self, config: Config, hf_config: Any, layout: Layout, reader: WeightReader, shape: WeightShape):
        self.config, self.layout = config, layout
        self.model = build_policy(config, hf_config, layout, ValueModel)
        self.model.load_weights(reader, shape, layout)
        self.ddp = wrap(self.model, config.parallel, config.critic.optimizer)
        gather_parameters(self.ddp)  # Megatron takes those of a new model for outdated
        self.feeder = build_feeder(config.batch.feeder, layout.device)
        self._reset_optimizer()

    def _reset_optimizer(self) -> None:
        config = self.config.critic.optimizer
        self.optimizer = Optimizer(self.ddp, config, self.model.config.params_dtype)
        self.guard = UpdateGuard(config, "critic.optimizer")

    def start_from(self, policy: Policy) -> None:
        """Take over the policy's layers, as after a warm start. The value head stays, and the optimizer begins anew."""
        with torch.no_grad():
            for own, theirs in zip(self.model, policy, strict=True):
                weights = dict(theirs.named_parameters())
                for name, parameter in own.named_parameters():
                    if not name.startswith(VALUE_HEAD):
                        parameter.copy_(weights[name])
        self._reset_optimizer()

    def score(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Return the micro-batches, on last-stage ranks with the values of the model as it is."""
        outputs = run_micro_batches(
            self.model, micro_batches, self._values, self.layout, backward=False, feeder=self.feeder
        )
        if not self.layout.is_last_stage:
            return list(micro_batches)
        return [batch.with_(values=output["values"]) for batch, output in zip(micro_batches, outputs, strict=True)]

    def update(self, micro_batches: Sequence[MicroBatch], *, update_follows: bool = False) -> CriticStats:
        """Take one gradient step on a mini-batch with values and returns, and return its statistics over all ranks.

        A step that is not finite on any rank, or a spike, is skipped on all ranks. Errors and collectives: as of Actor.update.
        """
        outputs = self.backward(micro_batches)
        norm = self.optimizer.prepare()
        stats = CriticStats.reduce(outputs, self.layout, grad_norm=norm, lr=self.optimizer.lr, judge=self.guard.judge)
        if stats.verdict.skips:
            stats = self._skip(micro_batches, outputs, stats)
        else:
            self.optimizer.step(norm)
        if not update_follows:
            gather_parameters(self.ddp)
        self.guard.add(stats.verdict, stats.grad_norm, stats.cause)
        return stats

    def _skip(
        self, micro_batches: Sequence[MicroBatch], outputs: Sequence[MicroBatchOutput], stats: CriticStats
    ) -> CriticStats:
        """End a gradient step without an update. Return its statistics with the cause."""
        self.optimizer.skip()
        search = partial(find_culprit, self.model, micro_batches, outputs, self.layout)
        cause, culprit = explain_skip(self.guard, stats.grad_norm, search)
        if culprit is not None and culprit.tensor == "weight":
            raise TrainingError(weights_lost(cause, "critic"))
        return replace(stats, cause=cause)

    def backward(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatchOutput]:
        """Compute the gradient of a mini-batch into main_grad, summed over data- and context-parallel ranks and not clipped."""
        for chunk in self.ddp:
            chunk.zero_grad_buffer()
        self.optimizer.megatron.zero_grad()
        return run_micro_batches(self.ddp, micro_batches, self._loss, self.layout, backward=True, feeder=self.feeder)

    def _values(
        self, model: PolicyModel, hidden: torch.Tensor, batch: MicroBatch
    ) -> tuple[torch.Tensor, MicroBatchOutput]:
        return hidden.new_zeros(()), {"values": self._value_rows(model, hidden, batch)}

    def _loss(
        self, model: PolicyModel, hidden: torch.Tensor, batch: MicroBatch
    ) -> tuple[torch.Tensor, MicroBatchOutput]:
        values, clip = self._value_rows(model, hidden, batch), self.config.critic.clip
        loss = value_loss(values, batch.values, batch.returns, batch.token_weights, clip)
        return loss, {"sums": _sums(loss.detach(), values.detach(), batch, clip)}

    def _value_rows(self, model: PolicyModel, hidden: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """Return the value at each row, float32 [L]: of the text before the row's target.

        Every tensor-parallel rank computes all rows, so gradients are complete on each, and none is summed over them.
        """
        if self.config.parallel.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        rows = hidden.flatten(0, 1).index_select(0, batch.rows)
        return model.value_head(rows.float())[:, 0]


@dataclass(frozen=True)
class CriticStats:
    """Statistics of one gradient step over all loss tokens of the mini-batch, on all ranks.

    sums     by SUMS; `loss` is the mini-batch's loss, the others are to be divided by `tokens`
    verdict, cause   as in UpdateStats
    """

    sums: dict[str, float]
    grad_norm: float
    lr: float
    verdict: Verdict
    cause: str = ""

    @classmethod
    def reduce(
        cls,
        micro_batches: Sequence[MicroBatchOutput],
        layout: Layout,
        *,
        grad_norm: float,
        lr: float,
        judge: Callable[[float], Verdict],
    ) -> CriticStats:
        """Add up the sums of all ranks, and let `judge` decide from the norm whether the step is skipped, as UpdateStats does.

        Collectives: two small gloo all-reduces.
        """
        sums = torch.zeros(len(SUMS), dtype=torch.float64)
        if layout.reports_loss:
            sums = torch.stack([stats["sums"] for stats in micro_batches]).sum(0).cpu()
        finite = math.isfinite(grad_norm) and bool(sums.isfinite().all())
        layout.sum_over_ranks(sums)
        # a maximum may lose a NaN, so the norm of a bad rank is 0 here and its flag 1
        most = layout.max_over_ranks(torch.tensor([grad_norm if finite else 0.0, not finite], dtype=torch.float64))
        norm = math.nan if most[1] else float(most[0])
        return cls(dict(zip(SUMS, sums.tolist())), norm, lr, judge(norm))


def critic_metrics(updates: Sequence[CriticStats]) -> dict[str, float]:
    """Return the `critic/…` metrics of one rollout step; {} without a critic.

    Steps that were not finite are counted and otherwise left out, as long as there are others.
    """
    if not updates:
        return {}
    finite = [u for u in updates if u.verdict is not Verdict.NOT_FINITE] or updates
    tokens = max(1.0, sum(u.sums["tokens"] for u in finite))
    mean = {name: sum(u.sums[name] for u in finite) / tokens for name in SUMS}
    variance = mean["return_squared"] - mean["return"] ** 2
    return {
        "critic/vf_loss": sum(u.sums["loss"] for u in finite) / len(finite),
        "critic/vpred_mean": mean["value"],
        "critic/returns/mean": mean["return"],
        "critic/vf_clipfrac": mean["clipped"],
        **({"critic/explained_variance": 1 - mean["error_squared"] / variance} if variance > 0 else {}),
        "critic/grad_norm": sum(u.grad_norm for u in finite) / len(finite),
        "critic/lr": updates[-1].lr,
        "critic/skipped_updates": float(sum(u.verdict.skips for u in updates)),
    }


def _sums(loss: torch.Tensor, values: torch.Tensor, batch: MicroBatch, clip: float | None) -> torch.Tensor:
    """Return float64 in the order of SUMS, over this rank's rows."""
    new, old, returns = values.double(), batch.values.double(), batch.returns.double()
    error, limit = (new - returns).square(), math.inf if clip is None else clip
    clipped = (old + (new - old).clamp(-limit, limit) - returns).square() > error
    terms = (torch.ones_like(new), new, returns, returns.square(), error, clipped.double())
    count, *rest = (term.sum() for term in terms)
    return torch.stack([count, loss.double(), *rest])
