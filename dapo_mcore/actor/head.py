"""From the last stage's hidden states to the loss: selects loss rows, applies the policy head over the tensor group."""

from __future__ import annotations

from typing import Any

import torch
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


class Head:
    """The policy head of one model: `loss` for training, `logprobs` for scoring, on one path with one chunk size.

    Only rows that carry loss are projected to the vocabulary. The head itself sums the gradient to the hidden states
    over the tensor group, hidden under its matrix products, and, with batch.head_eager_grad, adds the weight's gradient
    to Megatron's main_grad in the forward pass: every loss must then receive one backward pass with gradient 1.
    """

    def __init__(self, config: Config, layout: Layout, vocab_size: int):
        algo = config.algo
        self.objective = Objective(
            algo.clip_low,
            algo.clip_high,
            algo.dual_clip,
            algo.kl.coef if algo.kl.place == "loss" else 0.0,
            algo.kl.estimator,
            algo.entropy_coef,
        )
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
        self, model: PolicyModel, hidden: torch.Tensor, batch: MicroBatch, tis_weights: torch.Tensor | None
    ) -> PolicyHeadOutput:
        """The weighted sum of token losses over this rank's rows, differentiable; hidden [s, b, H]."""
        return linear_policy_loss(
            self._rows(hidden, batch),
            model.head_weight(),
            batch.targets,
            TokenInputs(batch.advantages, batch.token_weights, batch.old_logprobs, batch.ref_logprobs, tis_weights),
            self.objective,
            **self._gradients(model),
            **self.common,
        )

    def supervised_loss(self, model: PolicyModel, hidden: torch.Tensor, batch: MicroBatch) -> PolicyHeadOutput:
        """Weighted cross-entropy: the on-policy loss with every advantage 1 has exactly its gradient (temperature 1)."""
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
        """float32 [L], log-probs of the targets; no gradient."""
        return linear_logprobs(self._rows(hidden, batch), model.head_weight(), batch.targets, **self.common)[0]

    def _gradients(self, model: PolicyModel) -> dict[str, Any]:
        """Where gradients go; main_grad is a view of DDP's buffer, which belongs to the model and not to the head."""
        main_grad = model.head_weight().main_grad if self.eager_grad else None
        return {"reduce_hidden_grad": self.reduce_hidden_grad, "main_grad": main_grad}

    def _rows(self, hidden: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """[L, H]. Their gradient is complete on every rank, so under sequence parallelism each keeps its own part."""
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden.flatten(0, 1).index_select(0, batch.rows)
