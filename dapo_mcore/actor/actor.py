"""The trained policy on this rank: it scores micro-batches and takes gradient steps.

    micro-batches → score (old and reference log-probs) → update (one gradient step per mini-batch) → statistics

Change here: which models are held, and which loss a gradient step uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from dapo_mcore.actor.critic import Critic
from dapo_mcore.actor.forward_backward import MicroBatchOutput, run_micro_batches
from dapo_mcore.actor.head import PolicyHead
from dapo_mcore.actor.metrics import UpdateStats, micro_batch_stats
from dapo_mcore.actor.model.policy import Policy, PolicyModel, build_policy
from dapo_mcore.actor.not_finite import Culprit, explain_skip, find_culprit, weights_lost
from dapo_mcore.actor.optimizer import Optimizer
from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.actor.param_gather import gather_parameters
from dapo_mcore.actor.update_guard import UpdateGuard
from dapo_mcore.actor.wrap import wrap
from dapo_mcore.algo.adaptive_entropy import EntropyCoef
from dapo_mcore.algo.correction import importance_weights
from dapo_mcore.architecture.mapping import WeightReader
from dapo_mcore.architecture.shape import weight_shape
from dapo_mcore.batch.feeder import build_feeder
from dapo_mcore.config import optimizer as settings
from dapo_mcore.config.schema import Config
from dapo_mcore.errors import TrainingError
from dapo_mcore.types import MicroBatch

OnSkip = Callable[[UpdateStats, Culprit | None, Sequence[MicroBatchOutput]], None]
"""Called on every rank for a skipped gradient step, with what was not finite first and the outputs of its micro-batches."""


class Actor:
    """One rank's part of the policy and its optimizer, of the frozen reference policy if the KL coefficient is not 0, and of the
    critic if advantages are by GAE."""

    def __init__(self, config: Config, hf_config: Any, layout: Layout, reader: WeightReader):
        self.config = config
        self.hf_config = hf_config
        self.layout = layout
        self.shape = weight_shape(hf_config, layout.tensor)
        self.policy = build_policy(config, hf_config, layout)
        self.policy.load_weights(reader, self.shape, layout)
        own_routes = _with_own_routes(config)
        self.reference = self._build_reference(own_routes)
        self.ddp = wrap(self.policy, config.parallel, config.optimizer)
        gather_parameters(self.ddp)  # Megatron takes those of a new model for outdated
        self.head = PolicyHead(config, layout, self.shape.vocab_size)
        self.entropy_coef = EntropyCoef(config.algo.entropy_coef)
        self.feeder = build_feeder(config.batch.feeder, layout.device)
        self.reset_optimizer(config.optimizer)
        has_critic = config.algo.advantage == "gae"
        self.critic = Critic(own_routes, hf_config, layout, reader, self.shape) if has_critic else None

    def _build_reference(self, config: Config) -> Policy | None:
        if self.config.algo.kl.coef == 0:
            return None
        reference = build_policy(config, self.hf_config, self.layout).requires_grad_(False)
        reference.load_state_dict(self.policy.state_dict())
        return reference

    def freeze_reference(self) -> None:
        """Copy the current policy into the reference policy, as after a warm start."""
        if self.reference is not None:
            self.reference.load_state_dict(self.policy.state_dict())

    def reset_optimizer(self, config: settings.OptimizerConfig) -> None:
        """Replace the optimizer by a new one, with empty state and a new schedule, over the same weights."""
        self.optimizer = Optimizer(self.ddp, config, self.policy.config.params_dtype)
        self.guard = UpdateGuard(config)

    @property
    def entropy_coef(self) -> EntropyCoef:
        """Return the coefficient of the entropy bonus, which changes with algo.adaptive_entropy."""
        return self._entropy_coef

    @entropy_coef.setter
    def entropy_coef(self, coef: EntropyCoef) -> None:
        self._entropy_coef = coef
        self.head.objective = replace(self.head.objective, entropy_coef=coef.used)

    @property
    def trained(self) -> dict[str, Policy]:
        """Return the models that gradient steps change, by name: `policy`, and `critic` if there is one."""
        return {"policy": self.policy} | ({"critic": self.critic.model} if self.critic is not None else {})

    @property
    def num_updates(self) -> int:
        """Return the number of gradient steps of this optimizer, with skipped ones."""
        return self.guard.state.num_updates

    def score(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Return the micro-batches, on last-stage ranks with the policy's log-probs as old log-probs.

        It uses the same micro-batches, head and chunks as `update`, so the ratio of a gradient step with the same weights is
        exactly 1. That step gives the same gradient, bitwise, without old log-probs: they are its own then. With routing replay
        the micro-batches have routes too, on every rank.
        """
        if self.config.model.routing_replay == "scoring":
            micro_batches = [batch.with_(routes={}) for batch in micro_batches]
        return self._with_logprobs(self.policy, micro_batches, "old_logprobs")

    def logprobs(self, micro_batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        """Return the log-probs of the policy as it is now, float32 [L] of each micro-batch; an empty list before the last stage.

        Bitwise those of the forward pass of `update`: micro-batches that have routes replay them.
        """
        scored = self._with_logprobs(self.policy, micro_batches, "old_logprobs", replay=True)
        return [micro.old_logprobs for micro in scored] if self.layout.is_last_stage else []

    def score_reference(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Return the micro-batches, on last-stage ranks with the log-probs of the reference policy if there is one."""
        if self.reference is None:
            return list(micro_batches)
        return self._with_logprobs(self.reference, micro_batches, "ref_logprobs")

    def update(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        supervised: bool = False,
        check: Callable[[UpdateStats], None] | None = None,
        update_follows: bool = False,
        on_skip: OnSkip | None = None,
    ) -> UpdateStats:
        """Take one gradient step on a mini-batch and return its statistics over all ranks.

        supervised      maximise the targets' likelihood instead of the policy objective; advantages are not read
        check           called with the statistics before the weights change; an exception, on all ranks, leaves them as they are
        update_follows  nothing reads the weights before the next `update`. With parallel.overlap_param_gather its forward pass
                        gathers them then; otherwise they are whole when this returns
        If a number of the step is not finite on any rank, or the guard sees a spike, all ranks skip the step. Raises
        TrainingError, on every rank, at the last of optimizer.max_skipped_updates such steps in a row, and at once if a weight is
        not finite. Collectives: all of Megatron's for a gradient step.
        """
        outputs = self.backward(micro_batches, supervised=supervised)
        norm = self.optimizer.prepare()
        stats = UpdateStats.reduce(
            outputs,
            self.layout,
            grad_norm=norm,
            lr=self.optimizer.lr,
            judge=self.guard.judge,
            aux_loss=self.take_aux_loss(),
        )
        if check is not None:
            check(stats)
        if stats.skipped:
            stats = self._skip(micro_batches, outputs, stats, on_skip)
        else:
            self.optimizer.step(norm)
        if not update_follows:
            gather_parameters(self.ddp)
        self.guard.add(stats.verdict, stats.grad_norm, stats.cause)
        return stats

    def _skip(
        self,
        micro_batches: Sequence[MicroBatch],
        outputs: Sequence[MicroBatchOutput],
        stats: UpdateStats,
        on_skip: OnSkip | None,
    ) -> UpdateStats:
        """End a gradient step without an update. Return its statistics with the cause."""
        self.optimizer.skip()
        search = partial(find_culprit, self.policy, micro_batches, outputs, self.layout)
        cause, culprit = explain_skip(self.guard, stats.grad_norm, search)
        stats = replace(stats, cause=cause)
        if on_skip is not None:
            on_skip(stats, culprit, outputs)
        if culprit is not None and culprit.tensor == "weight":
            raise TrainingError(weights_lost(cause))
        return stats

    def backward(self, micro_batches: Sequence[MicroBatch], *, supervised: bool = False) -> list[MicroBatchOutput]:
        """Compute the gradient of a mini-batch, and return the outputs of its micro-batches as run_micro_batches does.

        Afterwards main_grad holds the gradient, summed over data- and context-parallel ranks and not clipped. The weights stay.
        """
        for chunk in self.ddp:
            chunk.zero_grad_buffer()
        self.optimizer.megatron.zero_grad()
        self.take_aux_loss()  # of a gradient without a step
        loss = self._supervised_loss if supervised else self._policy_loss
        return run_micro_batches(self.ddp, micro_batches, loss, self.layout, backward=True, feeder=self.feeder)

    def take_aux_loss(self) -> torch.Tensor | None:
        """Return this rank's part of the last gradient's load-balancing loss, mean over layers, fp64; None if there is none."""
        if not self.config.model.moe_aux_loss_coef:
            return None
        losses = [chunk.expert_routing.take_loss() for chunk in self.policy if chunk.expert_routing is not None]
        nothing = torch.zeros((), dtype=torch.float64, device=self.layout.device)
        return sum(losses, nothing) / sum(self.shape.moe_layers)

    def _with_logprobs(
        self, policy: Policy, micro_batches: Sequence[MicroBatch], field: str, *, replay: bool = False
    ) -> list[MicroBatch]:
        if not micro_batches:
            return []
        how: dict[str, Any] = {"backward": False, "replay": replay, "feeder": self.feeder}
        outputs = run_micro_batches(policy, micro_batches, self._logprobs, self.layout, **how)
        if not self.layout.is_last_stage:
            return list(micro_batches)
        return [
            batch.with_(**{field: output["logprobs"]}) for batch, output in zip(micro_batches, outputs, strict=True)
        ]

    def _logprobs(
        self, model: PolicyModel, hidden: torch.Tensor, batch: MicroBatch
    ) -> tuple[torch.Tensor, MicroBatchOutput]:
        return hidden.new_zeros(()), {"logprobs": self.head.logprobs(model, hidden, batch)}

    def _supervised_loss(
        self, model: PolicyModel, hidden: torch.Tensor, batch: MicroBatch
    ) -> tuple[torch.Tensor, MicroBatchOutput]:
        output = self.head.supervised_loss(model, hidden, batch)
        return output.loss, micro_batch_stats(output, batch, self.config.algo.tis)

    def _policy_loss(
        self, model: PolicyModel, hidden: torch.Tensor, batch: MicroBatch
    ) -> tuple[torch.Tensor, MicroBatchOutput]:
        tis_weights = self._tis_weights(batch)
        if self.config.algo.old_logprobs == "rollout":
            batch = batch.with_(old_logprobs=batch.rollout_logprobs)
        output = self.head.loss(model, hidden, batch, tis_weights)
        return output.loss, micro_batch_stats(output, batch, self.config.algo.tis)

    def _tis_weights(self, batch: MicroBatch) -> torch.Tensor | Callable[[torch.Tensor, slice], torch.Tensor] | None:
        """Return the weights of the policy term: those of the batch, or from the old log-probs, or, where the batch has none of both,
        a function of the forward pass's own."""
        tis, rollout, weights = self.config.algo.tis, batch.rollout_logprobs, batch.tis_weights
        if weights is None and tis.mode != "off" and batch.old_logprobs is not None:
            weights = importance_weights(batch.old_logprobs, rollout, tis)
        if batch.policy_mask is not None:
            return batch.policy_mask if weights is None else weights * batch.policy_mask
        if weights is not None or tis.mode == "off":
            return weights
        return lambda own, rows: importance_weights(own, rollout[rows], tis)


def _with_own_routes(config: Config) -> Config:
    """Return the configuration of a model beside the policy, whose routers never replay the policy's routes."""
    return config.model_copy(update={"model": config.model.model_copy(update={"routing_replay": "none"})})
