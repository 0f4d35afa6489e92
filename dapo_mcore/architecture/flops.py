"""The floating-point operations (FLOPs) of a model's forward pass over a batch of sequences.

Change here: what counts as work. Counted are the operations that the mathematics asks for, so the figure compares programs and
machines: padding, recomputed activations and masked halves of attention scores are not counted, nor is anything that is not
a product of matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from dapo_mcore.architecture.mapping import Parameter, hf_shapes, parameters
from dapo_mcore.architecture.shape import WeightShape, weight_shape
from dapo_mcore.architecture.weight_rules import EMBEDDING, OUTPUT


@dataclass(frozen=True)
class ForwardFlops:
    """The cost of a forward pass, by what it grows with. A forward and a backward pass together cost three times as much.

    With sequences of n_b tokens and L loss tokens:

      FLOPs = per_token · Σ n_b  +  per_square · Σ n_b²  +  per_loss_token · L

    per_token       2 · (elements of all weight matrices that a token passes): attention's projections, MLP, router, shared
                    experts, and of the experts only those that a token is sent to. A looked-up embedding costs nothing.
    per_square      layers · heads · (size per head of a key + that of a value): QKᵀ and the product with V cost 2 · n² of
                    these each, and a causal mask leaves half. Queries that share keys (GQA) cost as much as others.
    per_loss_token  2 · vocabulary · hidden size: the policy head, which sees the loss tokens only.
    """

    per_token: int
    per_square: int
    per_loss_token: int

    def count(self, lengths: np.ndarray, num_loss_tokens: int) -> float:
        """Return the FLOPs for sequences of these lengths, int64 [B], with `num_loss_tokens` loss tokens in all."""
        lengths = np.asarray(lengths, dtype=np.float64)
        head = self.per_loss_token * num_loss_tokens
        return float(self.per_token * lengths.sum() + self.per_square * np.square(lengths).sum() + head)


def forward_flops(hf_config: Any) -> ForwardFlops:
    """Return the cost of the model that a transformers config describes. Raises ConfigError for an unsupported one."""
    shape = weight_shape(hf_config, tensor_parallel=1)
    layers = [found for found in parameters(shape) if found.rule not in (EMBEDDING, OUTPUT)]
    everywhere = sum(_matrix_elements(found, shape) for found in layers if not found.rule.per_expert)
    of_experts = sum(_matrix_elements(found, shape) for found in layers if found.rule.per_expert)
    if of_experts:
        of_experts = of_experts * hf_config.num_experts_per_tok // shape.num_experts
    head_sizes = shape.head_dim + (shape.value_dim or shape.head_dim)
    return ForwardFlops(
        per_token=2 * (everywhere + of_experts),
        per_square=shape.num_layers * shape.num_heads * head_sizes,
        per_loss_token=2 * shape.vocab_size * shape.hidden_size,
    )


def _matrix_elements(parameter: Parameter, shape: WeightShape) -> int:
    return sum(prod(sizes) for sizes in hf_shapes(parameter, shape) if len(sizes) == 2)
