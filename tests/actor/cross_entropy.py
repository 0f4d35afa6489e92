"""The plainest loss over the problems of families.py: cross-entropy over whole logits, on the micro-batches of a rank."""

from __future__ import annotations

from typing import Any

import torch

from tests.actor import families
from tests.actor.families import LENGTHS, Problem


def own_batches(layout: Any) -> list[int]:
    """Return the micro-batches of this data-parallel rank."""
    return [batch for batch in range(len(LENGTHS)) if layout.data == 1 or batch == layout.data_rank]


def held_positions(batch: int, layout: Any) -> torch.Tensor:
    """Return this context-parallel rank's tokens of a micro-batch, int64, in the order of its flattened hidden [s, b]."""
    import numpy as np

    from dapo_mcore.batch.context import zigzag_positions

    held = torch.from_numpy(zigzag_positions(np.array(LENGTHS[batch]), layout.context, layout.context_rank))
    return held.view(len(LENGTHS[batch]), -1).T.flatten() if batch else held


def micro_batch(problem: Problem, batch: int, layout: Any) -> Any:
    from dapo_mcore.types import MicroBatch

    lengths = torch.tensor(LENGTHS[batch])
    positions = torch.cat([torch.arange(n) for n in lengths])
    held = held_positions(batch, layout)
    shape = (1, -1) if batch == 0 else (-1, len(lengths))

    def rectangle(values: torch.Tensor) -> torch.Tensor:
        found = values[held].view(shape)
        return found if batch == 0 else found.T.contiguous()

    empty = torch.empty(0)
    return MicroBatch(
        tokens=rectangle(problem.tokens[batch]),
        position_ids=rectangle(positions),
        cu_seqlens=torch.cat([torch.zeros(1), lengths.cumsum(0)]).int() if batch == 0 else None,
        lengths=lengths.numpy(),
        rows=held,
        targets=problem.targets[batch][held],
        advantages=empty,
        token_weights=problem.loss_weights[batch][held],
        rollout_logprobs=empty,
        sample_ids=empty,
    )


def cross_entropy(policy: Any, hidden: torch.Tensor, batch: Any, layout: Any) -> tuple[torch.Tensor, Any]:
    """Return the weighted cross-entropy over whole logits, which every tensor-parallel rank gathers."""
    from megatron.core.tensor_parallel import mappings

    if policy.config.sequence_parallel:
        hidden = mappings.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    else:
        hidden = mappings.copy_to_tensor_model_parallel_region(hidden)
    shard = hidden.flatten(0, 1) @ policy.head_weight().T
    logits = mappings.gather_from_tensor_model_parallel_region(shard)[:, : families.VOCAB]
    logp = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    return -(logp * batch.token_weights).sum(), {"logits": logits.detach()}
