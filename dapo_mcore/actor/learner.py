"""Learns from one rollout step: scattered samples → score → advantages → gradient steps.

Change here: the order of learning within a rollout step. Its parts are elsewhere: which rank trains on which samples
(scatter), the objective (algo, kernels), the gradient step (actor).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dapo_mcore.actor.actor import Actor
from dapo_mcore.actor.corrections import find_corrections
from dapo_mcore.actor.covariance_selection import with_selection
from dapo_mcore.actor.critic import Critic, CriticStats
from dapo_mcore.actor.metrics import UpdateStats
from dapo_mcore.actor.model.fp8_rules import token_multiple
from dapo_mcore.actor.not_finite import Culprit
from dapo_mcore.actor.scatter import MiniBatchPlan, SampleMetadata, ScatteredStep
from dapo_mcore.actor.skipped_batch import SKIPPED, SkippedBatch, write_skipped
from dapo_mcore.actor.token_advantages import with_token_advantages
from dapo_mcore.actor.update_guard import Verdict
from dapo_mcore.algo.advantage import group_advantages, whitened
from dapo_mcore.algo.correction import (
    UNCORRECTED,
    MismatchStats,
    check_mismatch,
    mismatch_metrics,
    mismatch_stats,
)
from dapo_mcore.algo.kl import penalised_rewards
from dapo_mcore.algo.loss import balance_weights, sample_weights
from dapo_mcore.batch.microbatch import build_micro_batch
from dapo_mcore.config.algo import LossMode
from dapo_mcore.config.schema import Config
from dapo_mcore.kernels.policy_loss import kl_terms
from dapo_mcore.types import MicroBatch


@dataclass(frozen=True)
class ScoredStep:
    """The mini-batches of a rollout step, ready for gradient steps.

    mismatch  over all ranks, of the mini-batches after the first. Empty if these are not scored.
    step      the samples that the micro-batches were built from
    metrics   of what was found before the gradient steps
    """

    mini_batches: list[list[MicroBatch]]
    mismatch: MismatchStats
    step: ScatteredStep
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainedStep:
    """Statistics of the gradient steps of a rollout step, in order: of the policy, and of the critic."""

    policy: list[UpdateStats]
    critic: list[CriticStats]


class Learner:
    """Trains an actor on scattered rollout steps. Every rank calls the same methods in the same order.

    tell     gets a line about each skipped gradient step, on rank 0
    skipped  folder for the mini-batches of skipped steps; None is `skipped` in the run's
    """

    def __init__(
        self, actor: Actor, pad_token: int, tell: Callable[[str], object] = print, skipped: Path | None = None
    ):
        self.actor, self.tell = actor, tell
        self.config: Config = actor.config
        self.skipped = skipped or self.config.run_dir / SKIPPED
        self.layout = actor.layout
        self.pad_token = pad_token

    def score(self, step: ScatteredStep) -> ScoredStep:
        """Return the step's micro-batches with advantages, and with old and reference log-probs where a loss needs them.

        Builds the micro-batches before it scores them, so scoring and training use the same ones.
        """
        mini_batches = self.build(step, self.config.algo.loss_mode)
        bounds = np.cumsum([0, *(len(mini) for mini in mini_batches)])
        flat = [micro for mini in mini_batches for micro in mini]
        start = bounds[self.config.num_unscored(len(mini_batches))]
        flat[start:] = self.actor.score(flat[start:])
        flat = self.actor.score_reference(flat)
        flat, num_trained, metrics = self._corrected(step, flat)
        mismatch = self._mismatch(flat[max(start, bounds[1]) :])
        flat = self._with_advantages(step.metadata, num_trained, flat)
        if self.config.algo.adaptive_entropy is not None:
            metrics["actor/entropy_coef"] = self.actor.entropy_coef.used
        return ScoredStep([flat[a:b] for a, b in pairwise(bounds)], mismatch, step, metrics)

    def build(self, step: ScatteredStep, loss_mode: LossMode) -> list[list[MicroBatch]]:
        """Return this rank's micro-batches of every mini-batch, with token weights and without advantages."""
        return [self._build_mini_batch(step, plan, loss_mode) for plan in step.plan]

    def train(
        self,
        scored: ScoredStep,
        step: int,
        uids: Sequence[str] = (),
        watch: Callable[[UpdateStats], None] = lambda stats: None,
    ) -> TrainedStep:
        """Take all gradient steps of rollout step `step`: those of the critic, then, after critic.warmup_steps, of the policy."""
        critic = [] if self.actor.critic is None else self._update_critic(self.actor.critic, scored)
        warms_up = step <= self.config.critic.warmup_steps
        stats = [] if warms_up else self.update(scored, uids, watch)
        self._adapt_entropy(stats[: len(scored.mini_batches)])
        return TrainedStep(stats, critic)

    def update(
        self, scored: ScoredStep, uids: Sequence[str] = (), watch: Callable[[UpdateStats], None] = lambda stats: None
    ) -> list[UpdateStats]:
        """Take one gradient step per mini-batch, `batch.epochs` times over, and return the statistics of each.

        Skipped steps are told, and their mini-batches written. uids [P], on rank 0: of the prompts of the step's groups.
        watch  called with the statistics of each step before it changes the weights; the gradients are there then.
        Raises RolloutError on every rank, before any weight changes, if the engine's log-probs differ from the actor's by more
        than algo.max_mismatch. Raises TrainingError on every rank if skipped steps end the run.
        """
        first, *others = enumerate(scored.mini_batches)

        def check(stats: UpdateStats) -> None:
            own = None if stats.verdict is Verdict.NOT_FINITE else stats.mismatch
            total = scored.mismatch if own is None else own + scored.mismatch
            check_mismatch(mismatch_metrics(total), self.config.algo.max_mismatch)
            watch(stats)

        count = self.config.batch.epochs * len(scored.mini_batches)
        step = partial(self._take_step, scored, uids)
        stats = step(*first, check=check, update_follows=count > 1)
        again = (0, _with_own_logprobs(first[1], stats))
        rest = others + [again, *others] * (self.config.batch.epochs - 1)
        return [stats, *(step(*mini, check=watch, update_follows=n < count) for n, mini in enumerate(rest, 2))]

    def _take_step(
        self, scored: ScoredStep, uids: Sequence[str], number: int, micro_batches: list[MicroBatch], **options: Any
    ) -> UpdateStats:
        """Take the gradient step of mini-batch `number`."""

        def on_skip(stats: UpdateStats, culprit: Culprit | None, outputs: Sequence[dict[str, torch.Tensor]]) -> None:
            batch = SkippedBatch(scored.step, scored.step.plan[number], micro_batches, outputs)
            self._report_skip(batch, stats, culprit, uids)

        selection: dict[str, float] = {}
        if self.config.algo.selects_by_covariance:
            micro_batches, selection = self._selected(micro_batches)
        stats = self.actor.update(micro_batches, on_skip=on_skip, **options)
        if selection:
            stats = replace(stats, selection=selection)
        if stats.verdict is Verdict.NEW_LEVEL and self.layout.is_controller:
            self.tell(
                f"gradient step {self.actor.num_updates} was taken: {stats.grad_norm:.3g} is the gradient norm's new level, "
                f"after {self.config.optimizer.max_skipped_updates - 1} spikes in a row"
            )
        return stats

    def _selected(self, micro_batches: list[MicroBatch]) -> tuple[list[MicroBatch], dict[str, float]]:
        """Return a mini-batch with the tokens that KL-Cov or Clip-Cov chooses for its gradient step, and their metrics."""
        logprobs, draw = self.actor.logprobs(micro_batches), (self.config.seed << 32) + self.actor.num_updates
        return with_selection(micro_batches, logprobs, draw, self.config.algo, self.layout)

    def _adapt_entropy(self, updates: Sequence[UpdateStats]) -> None:
        """Move the entropy coefficient after the gradient steps of a rollout step's first epoch."""
        if self.config.algo.adaptive_entropy is None:
            return
        finite = [u.sums for u in updates if u.verdict is not Verdict.NOT_FINITE]
        tokens = sum(sums["tokens"] for sums in finite)
        entropy = sum(sums["nll"] for sums in finite) / tokens if tokens else math.nan
        self.actor.entropy_coef = self.actor.entropy_coef.after(entropy, self.config.algo.adaptive_entropy)

    def _report_skip(
        self, batch: SkippedBatch, stats: UpdateStats, culprit: Culprit | None, uids: Sequence[str]
    ) -> None:
        """Write the mini-batch of a skipped step, and tell its cause on rank 0. Collectives: those of write_skipped."""
        number = self.actor.num_updates + 1
        facts = {
            "update": number,
            "verdict": stats.verdict.value,
            "cause": stats.cause,
            "culprit": culprit and {"tensor": culprit.tensor} | culprit._asdict(),
            "grad_norm": stats.grad_norm,
            "usual_grad_norm": self.actor.guard.usual_norm,
            "lr": stats.lr,
            **stats.sums,
            "samples": batch.samples(uids) if self.layout.is_controller else [],
        }
        where = write_skipped(self.skipped / f"update_{number:06d}", batch, facts, self.layout)
        if self.layout.is_controller:
            self.tell(
                f"warning: gradient step {number} was skipped on all ranks: {stats.cause}; {where}; "
                f"optimizer.max_skipped_updates {self.config.optimizer.max_skipped_updates} in a row end the run"
            )

    def _update_critic(self, critic: Critic, scored: ScoredStep) -> list[CriticStats]:
        """Take one gradient step per mini-batch, `batch.epochs` times over, and return the statistics of each."""
        minis, found = list(scored.mini_batches) * self.config.batch.epochs, []
        for number, mini in enumerate(minis, 1):
            found.append(critic.update(mini, update_follows=number < len(minis)))
            if found[-1].verdict.skips and self.layout.is_controller:
                self.tell(
                    f"warning: gradient step {critic.guard.state.num_updates} of the critic was skipped on all ranks: "
                    f"{found[-1].cause}; critic.optimizer.max_skipped_updates {self.config.critic.optimizer.max_skipped_updates} "
                    f"in a row end the run"
                )
        return found

    def _build_mini_batch(self, step: ScatteredStep, plan: MiniBatchPlan, loss_mode: LossMode) -> list[MicroBatch]:
        metadata, layout = step.metadata, self.layout
        loss_tokens = metadata.num_loss_tokens[plan.samples]
        weights, balance = np.zeros((2, len(metadata.lengths)))
        balance[plan.samples] = balance_weights(loss_tokens, metadata.lengths[plan.samples])
        weights[plan.samples] = self._weights(plan, loss_tokens, loss_mode)
        local = step.global_ids
        build = partial(
            build_micro_batch,
            step.batch,
            advantages=np.zeros(len(local)),
            weights=weights[local],
            context_parallel=layout.context,
            context_rank=layout.context_rank,
            tensor_multiple=token_multiple(self.config.model, self.config.parallel),
            packing=self.config.batch.packing,
            pad_token=self.pad_token,
            balance_weights=balance[local] if self.config.model.moe_aux_loss_coef else None,
            with_sequences=self.config.algo.policy_loss == "gspo",
        )
        parts = plan.micro[layout.data_rank]
        micro_batches = [build([step.local_of[sample] for sample in samples]) for samples in parts]
        to_global = torch.from_numpy(local)
        return [micro.with_(sample_ids=to_global.index_select(0, micro.sample_ids)) for micro in micro_batches]

    def _weights(self, plan: MiniBatchPlan, num_loss_tokens: np.ndarray, loss_mode: LossMode) -> np.ndarray:
        """Return the weight of each loss token of each sample of a mini-batch. num_loss_tokens [n], of its samples."""
        return sample_weights(
            loss_mode,
            num_loss_tokens,
            micro_batch_ids=plan.micro_batch_ids,
            loss_length=self.config.algo.loss_length or self.config.rollout.max_response_tokens,
        )

    def _corrected(
        self, step: ScatteredStep, scored: list[MicroBatch]
    ) -> tuple[list[MicroBatch], np.ndarray, dict[str, float]]:
        """Return the micro-batches with the step's corrections, the loss tokens of each sample that are not rejected, [B], and metrics.

        A rejected token has weight 0. With algo.rejection_divisor kept, the weights of the others are as if it had never been a
        loss token.
        """
        algo, counts = self.config.algo, step.metadata.num_loss_tokens
        if not algo.corrects_before:
            return scored, counts, {}
        found = find_corrections(scored, torch.from_numpy(counts), algo, self.layout)
        weights, counted = np.zeros(len(counts)), found.num_kept.numpy() if algo.rejection_divisor == "kept" else counts
        for plan in step.plan:
            weights[plan.samples] = self._weights(plan, counted[plan.samples], algo.loss_mode)
        of_samples, parts = torch.from_numpy(weights).float(), zip(scored, found.tis_weights, found.rejected)
        corrected = [
            micro.with_(tis_weights=tis, token_weights=of_samples[micro.sample_ids].masked_fill(rejected, 0.0))
            for micro, tis, rejected in parts
        ]
        return corrected if self.layout.is_last_stage else scored, found.num_kept.numpy(), found.metrics

    def _with_advantages(
        self, metadata: SampleMetadata, num_trained: np.ndarray, scored: Sequence[MicroBatch]
    ) -> list[MicroBatch]:
        """Return the micro-batches with the advantages of their tokens, and with a critic its values and returns.

        num_trained  int64 [B], loss tokens that are not rejected.
        """
        if self.actor.critic is not None:
            valued = self.actor.critic.score(scored)
            return with_token_advantages(valued, metadata.rewards, self.config.algo, self.layout)
        advantages = self._advantages(metadata, num_trained, scored)
        return [micro.with_(advantages=advantages.index_select(0, micro.sample_ids)) for micro in scored]

    def _advantages(
        self, metadata: SampleMetadata, num_trained: np.ndarray, scored: Sequence[MicroBatch]
    ) -> torch.Tensor:
        """Return the advantages of all samples of the step, float32 [B], the same on every rank."""
        algo = self.config.algo
        rewards = metadata.rewards
        if algo.penalises_rewards:
            rewards = penalised_rewards(rewards, self._kl_sums(len(rewards), scored), algo.kl.coef)
        advantages = group_advantages(
            rewards,
            metadata.group_ids,
            metadata.in_statistics & np.isfinite(rewards),  # a KL may not be: only its own mini-batch is skipped
            std="none" if algo.advantage_std == "batch" else algo.advantage_std,
            baseline=algo.advantage_baseline,
            eps=algo.advantage_eps,
        )
        if algo.advantage_std == "batch":
            advantages = whitened(advantages, num_trained)
        return torch.from_numpy(advantages).float()

    def _kl_sums(self, num_samples: int, scored: Sequence[MicroBatch]) -> np.ndarray:
        """Return each sample's KL estimate, summed over its loss tokens, float64 [B]. Collective: one gloo all-reduce."""
        sums = torch.zeros(num_samples, dtype=torch.float64)
        if self.layout.reports_loss:
            for micro in scored:
                kl, _ = kl_terms(micro.old_logprobs - micro.ref_logprobs, self.config.algo.kl.estimator)
                sums.index_add_(0, micro.sample_ids, kl.double().cpu())
        return self.layout.sum_over_ranks(sums).numpy()

    def _mismatch(self, scored: Sequence[MicroBatch]) -> MismatchStats:
        """Return how far old log-probs are from rollout log-probs, over all ranks' loss tokens of the scored micro-batches.

        Collectives: two gloo all-reduces, unless there is no micro-batch.
        """
        tis, nothing = self.config.algo.tis, torch.zeros(0)
        total = mismatch_stats(nothing, nothing)
        if not scored:
            return total
        if self.layout.reports_loss:
            for micro in scored:
                old = micro.old_logprobs.cpu()
                used = UNCORRECTED if micro.tis_weights is not None else tis
                own = mismatch_stats(old, micro.rollout_logprobs.to(old.dtype), used)
                if own.sums.isfinite().all():  # otherwise its gradient step is skipped
                    total += own
        return MismatchStats(self.layout.sum_over_ranks(total.sums), self.layout.max_over_ranks(total.maximum))


def _with_own_logprobs(micro_batches: list[MicroBatch], first_step: UpdateStats) -> list[MicroBatch]:
    """Return the micro-batches of the first gradient step for a further epoch: old log-probs that were not scored are those of
    that step's forward pass, bitwise what scoring gives."""
    if not first_step.logprobs or micro_batches[0].old_logprobs is not None:
        return micro_batches
    return [
        micro.with_(old_logprobs=logprobs) for micro, logprobs in zip(micro_batches, first_step.logprobs, strict=True)
    ]
