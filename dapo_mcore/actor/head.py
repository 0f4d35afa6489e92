"""From the last stage's hidden states to log-probs and losses, with the kernels' policy head over the tensor-parallel group.

Change here: what the last stage computes from hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from dapo_mcore.actor.model.policy import PolicyModel
from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.config.schema import Config
from dapo_mcore.kernels.policy_head import (
    Objective,
    PolicyHeadOutput,
    TokenInputs,
    linear_logprobs,
    linear_policy_loss,
)
from dapo_mcore.types import MicroBatch


class PolicyHead:
    """The policy head: losses for training and log-probs for scoring, computed the same way with the same chunk size.

    Only rows that carry loss are projected to the vocabulary. The head sums the hidden states' gradient over the
    tensor-parallel group itself, overlapped with its matrix products. With batch.head_eager_grad it adds the weight's gradient
    to Megatron's main_grad in the forward pass: then every loss must receive exactly one backward pass, with gradient 1.
    """

    def __init__(self, config: Config, layout: Layout, vocab_size: int):
        algo = config.algo
        # KL-Cov has no clipping: its bounds are beyond the ±20 nats at which the ratio ends
        clip_low, clip_high = (1.0, 1e9) if algo.policy_loss == "kl_cov" else (algo.clip_low, algo.clip_high)
        self.objective = Objective(
            clip_low,
            clip_high,
            algo.dual_clip,
            algo.kl.coef if algo.kl.place == "loss" else 0.0,
            algo.kl.estimator,
            algo.entropy_coef,
            "cispo" if algo.policy_loss == "cispo" else "clip",
        )
        self.per_sequence = algo.policy_loss == "gspo"
        self.context_group = layout.context_group if layout.context > 1 else None
        self.sequence_parallel = config.parallel.sequence_parallel
        self.eager_grad = config.batch.head_eager_grad
        self.reduce_hidden_grad = True
        self.common = dict(
            temperature=config.rollout.temperature,
            vocab_size=vocab_size,
            tp_group=layout.tensor_group if layout.tensor > 1 else None,
            chunk_tokens=config.batch.head_chunk_tokens,
        )

    def loss(
        self,
        model: PolicyModel,
        hidden: torch.Tensor,
        batch: MicroBatch,
        tis_weights: torch.Tensor | Callable[[torch.Tensor, slice], torch.Tensor] | None,
    ) -> PolicyHeadOutput:
        """Return the weighted sum of token losses over this rank's rows, differentiable. hidden [s, b, H].

        batch        old_logprobs None means the log-probs of this forward pass, detached: the ratio is exactly 1
        tis_weights  float32 [L], or a function of this forward pass's log-probs of a slice of the L rows
        Collective with a ratio per sequence and given old log-probs: one all-reduce over the context-parallel group.

        A ratio per sequence (GSPO) is s = exp(mean of log p - old over the tokens that the policy wrote), and its gradient goes
        through each token's own log p as in verl 0.9.1. slime's and NeMo-RL's goes through the mean: the same unless advantages
        differ within a sequence. Our exponent is clamped to ±20, verl's to at most 10, theirs not at all. `tis_weights` are
        per token; with such ratios NeMo-RL's are per sequence, exp(Σ of actor - engine).
        """
        old = batch.old_logprobs
        if self.per_sequence and old is not None:
            own = self.logprobs(model, hidden.detach(), batch)
            # log p - old is then the sequence's log-ratio at every token, and its derivative that of log p
            old = own - self._sequence_log_ratios(own - old, batch)
        given = tis_weights if isinstance(tis_weights, torch.Tensor) else None
        return linear_policy_loss(
            self._rows(hidden, batch),
            model.head_weight(),
            batch.targets,
            TokenInputs(batch.advantages, batch.token_weights, old, batch.ref_logprobs, given, batch.old_kl_coefs),
            self.objective,
            own_tis_weights=tis_weights if given is None else None,
            **self._gradients(model),
            **self.common,
        )

    def supervised_loss(self, model: PolicyModel, hidden: torch.Tensor, batch: MicroBatch) -> PolicyHeadOutput:
        """Return the weighted cross-entropy. Its gradient is exactly that of the on-policy loss with advantages 1 and temperature 1."""
        return linear_policy_loss(
            self._rows(hidden, batch),
            model.head_weight(),
            batch.targets,
            TokenInputs(torch.ones_like(batch.token_weights), batch.token_weights),
            Objective(),
            **self._gradients(model),
            **self.common | {"temperature": 1.0},
        )

    def logprobs(self, model: PolicyModel, hidden: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """Return the log-probs of the L targets, float32 [L], without gradient."""
        return linear_logprobs(self._rows(hidden, batch), model.head_weight(), batch.targets, **self.common)[0]

    def _sequence_log_ratios(self, log_ratios: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """Return for each row the mean of `log_ratios` over the loss tokens of its sample, [L]; rejected ones do not count.

        Source: s_i of GSPO (arXiv 2507.18071) eq. 7. Collective: one all-reduce over the context-parallel group.
        """
        sums = log_ratios.new_zeros(2, len(batch.lengths), dtype=torch.float64)
        counted = (batch.token_weights > 0).double()
        sums[0].index_add_(0, batch.row_sequences, log_ratios.double() * counted)
        sums[1].index_add_(0, batch.row_sequences, counted)
        if self.context_group is not None:
            dist.all_reduce(sums, group=self.context_group)
        means = sums[0] / sums[1].clamp(min=1)
        return means.index_select(0, batch.row_sequences).to(log_ratios.dtype)

    def _gradients(self, model: PolicyModel) -> dict[str, Any]:
        """Return the gradient arguments. main_grad is a view of DDP's buffer and belongs to the model, so it is not kept."""
        main_grad = model.head_weight().main_grad if self.eager_grad else None
        return {"reduce_hidden_grad": self.reduce_hidden_grad, "main_grad": main_grad}

    def _rows(self, hidden: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """Return the hidden states that carry loss, [L, H].

        Their gradient is complete on every rank, so under sequence parallelism each rank keeps only its own part of it.
        """
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden.flatten(0, 1).index_select(0, batch.rows)
