"""The trained policy on this rank: score micro-batches, take gradient steps, hand out weights.

micro-batches → score (old and reference log-probs) → update (one gradient step per mini-batch) → metrics
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from dapo_mcore.actor.head import Head
from dapo_mcore.actor.metrics import UpdateSums, token_sums
from dapo_mcore.actor.model.policy import PolicyModel, build_model
from dapo_mcore.actor.optimizer import Optimizer
from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.actor.skips import Skips
from dapo_mcore.actor.step import Outcome, finalize_without_division, run_micro_batches
from dapo_mcore.algo.correction import importance_weights
from dapo_mcore.architecture.mapping import WeightReader
from dapo_mcore.architecture.shape import weight_shape
from dapo_mcore.config import schema as settings
from dapo_mcore.config.schema import Config
from dapo_mcore.types import MicroBatch


class Actor:
    """One rank's part of the policy with its optimizer, and a frozen reference policy when the KL is on."""

    def __init__(self, config: Config, hf_config: Any, layout: Layout, reader: WeightReader):
        self.config = config
        self.hf_config = hf_config
        self.layout = layout
        self.shape = weight_shape(hf_config, layout.tensor)
        self.policy = build_model(config, hf_config, layout)
        self.policy.load_weights(reader, self.shape, layout)
        self.reference = self._build_reference(hf_config)
        self.ddp = wrap(self.policy, config)
        self.head = Head(config, layout, self.shape.vocab_size)
        self.num_updates = 0
        self.reset_optimizer(config.optimizer)

    def _build_reference(self, hf_config: Any) -> PolicyModel | None:
        if self.config.algo.kl.coef == 0:
            return None
        reference = build_model(self.config, hf_config, self.layout).requires_grad_(False)
        reference.load_state_dict(self.policy.state_dict())
        return reference

    def freeze_reference(self) -> None:
        """Makes the current policy the reference, as after a warm start."""
        if self.reference is not None:
            self.reference.load_state_dict(self.policy.state_dict())

    def reset_optimizer(self, config: settings.OptimizerConfig) -> None:
        """Starts a new optimizer state and schedule over the same weights."""
        self.optimizer = Optimizer(self.ddp, config, self.policy.config.params_dtype)
        self.num_updates = 0
        self.skips = Skips(config.max_skipped_updates)

    def score(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """The micro-batches with old (and reference) log-probs filled in on last-stage ranks.

        The same micro-batches, head and chunking as in `update`, so the ratio of the first gradient step is exactly 1.
        """
        scored = self._with_logprobs(self.policy, micro_batches, "old_logprobs")
        return scored if self.reference is None else self._with_logprobs(self.reference, scored, "ref_logprobs")

    def update(self, micro_batches: Sequence[MicroBatch], *, supervised: bool = False) -> UpdateSums:
        """One gradient step on a mini-batch; the sums of its metrics over all ranks. Collectives: all of a step's.

        supervised  maximises the targets' likelihood instead of the policy objective; advantages are not read.
        A gradient that is not finite on any rank skips the step on all. Raises TrainingError, on every rank, at the last
        of optimizer.max_skipped_updates skipped steps in a row.
        """
        self.ddp.zero_grad_buffer()
        self.optimizer.megatron.zero_grad()
        loss = self._supervised_loss if supervised else self._policy_loss
        outcomes = run_micro_batches(self.ddp, micro_batches, loss, self.layout, backward=True)
        norm = self.optimizer.prepare()
        sums = UpdateSums.reduce(outcomes, self.layout, grad_norm=norm, lr=self.optimizer.lr)
        if not sums.skipped:
            self.optimizer.step(norm)
        self.num_updates += 1
        self.skips.add(sums.skipped)
        return sums

    def _with_logprobs(self, model: PolicyModel, micro_batches: Sequence[MicroBatch], field: str) -> list[MicroBatch]:
        outcomes = run_micro_batches(model, micro_batches, self._logprobs, self.layout, backward=False)
        if not self.layout.is_last_stage:
            return list(micro_batches)
        return [batch.with_(**{field: out["logprobs"]}) for batch, out in zip(micro_batches, outcomes, strict=True)]

    def _logprobs(self, model: PolicyModel, hidden: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, Outcome]:
        return hidden.new_zeros(()), {"logprobs": self.head.logprobs(model, hidden, batch)}

    def _supervised_loss(
        self, model: PolicyModel, hidden: torch.Tensor, batch: MicroBatch
    ) -> tuple[torch.Tensor, Outcome]:
        output = self.head.supervised_loss(model, hidden, batch)
        return output.loss, token_sums(output, batch)

    def _policy_loss(self, model: PolicyModel, hidden: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, Outcome]:
        algo = self.config.algo
        tis = None
        if algo.tis.mode != "off" and batch.old_logprobs is not None:
            tis = importance_weights(batch.old_logprobs, batch.rollout_logprobs, algo.tis.mode, algo.tis.cap)
        if algo.old_logprobs == "rollout" and batch.old_logprobs is not None:
            batch = batch.with_(old_logprobs=batch.rollout_logprobs)
        output = self.head.loss(model, hidden, batch, tis)
        return output.loss, token_sums(output, batch)


def wrap(policy: PolicyModel, config: Config) -> DistributedDataParallel:
    """The policy with gradient buffers in fp32, which are summed over ranks once a gradient step and never divided."""
    policy.config.finalize_model_grads_func = finalize_without_division
    return DistributedDataParallel(
        policy.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=False,
            use_distributed_optimizer=config.optimizer.distributed,
            average_in_collective=False,
        ),
        policy,
    )
