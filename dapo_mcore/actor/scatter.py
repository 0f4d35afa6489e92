"""One rollout step's samples, from rank 0 to the data-parallel replicas that train on them.

Small per-sample facts go to every rank, so that all ranks compute the same plan without talking; tokens go only to the
replica that trains on them. Everything travels as flat host tensors over gloo, no pickles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.batch.collate import select
from dapo_mcore.batch.packing import micro_batch_ids, plan_micro_batches, split_mini_batches
from dapo_mcore.config.schema import Config
from dapo_mcore.types import TrainBatch


@dataclass(frozen=True)
class StepFacts:
    """What every rank knows of every sample of the step; arrays of length B in the controller's sample order."""

    lengths: np.ndarray  # int64
    num_loss_tokens: np.ndarray  # int64
    rewards: np.ndarray  # float64
    group_ids: np.ndarray  # int64
    in_statistics: np.ndarray  # bool


@dataclass(frozen=True)
class MiniBatchPlan:
    """The samples of one gradient step, by their global numbers.

    samples          int64 [n], of all replicas together
    micro            [replica][k]: the samples of a replica's k-th micro-batch
    micro_batch_ids  int64 [n], which micro-batch of the whole mini-batch each of `samples` is in
    """

    samples: np.ndarray
    micro: list[list[list[int]]]
    micro_batch_ids: np.ndarray


@dataclass(frozen=True)
class StepShare:
    """This replica's part: its samples' tokens. `global_ids` int64 [n] names each local sample, `local_of` inverts it."""

    facts: StepFacts
    plan: list[MiniBatchPlan]
    batch: TrainBatch
    global_ids: np.ndarray
    local_of: dict[int, int]


def scatter_step(
    batch: TrainBatch | None, config: Config, layout: Layout, *, mini_batch_prompts: int, seed: int | None
) -> StepShare:
    """This rank's share of rank 0's `batch` (None elsewhere). Collectives: gloo broadcasts from rank 0."""
    facts = _broadcast_facts(batch, layout)
    plan = plan_step(facts, config, layout, mini_batch_prompts, seed)
    for replica, group in enumerate(layout.replica_groups):
        samples = replica_samples(plan, replica)
        if group is not None:
            part = _broadcast_tokens(batch, samples, facts, group, layout)
            if replica == layout.data_rank:
                mine = part
    global_ids = np.array(replica_samples(plan, layout.data_rank), dtype=np.int64)
    local_of = {sample: i for i, sample in enumerate(global_ids.tolist())}
    return StepShare(facts, plan, mine, global_ids, local_of)


def plan_step(
    facts: StepFacts, config: Config, layout: Layout, mini_batch_prompts: int, seed: int | None
) -> list[MiniBatchPlan]:
    """Mini-batches of whole groups, each balanced over replicas and cut into micro-batches. Deterministic."""
    plans = []
    for samples in split_mini_batches(facts.group_ids, mini_batch_prompts, seed, allow_ragged=True):
        micro = plan_micro_batches(
            facts.lengths[samples],
            data_parallel=layout.data,
            context_parallel=layout.context,
            max_tokens=config.batch.max_tokens,
            align=layout.tensor if config.parallel.sequence_parallel else 1,
            packing=config.batch.packing,
        )
        numbers = [[samples[part].tolist() for part in rank] for rank in micro]
        plans.append(MiniBatchPlan(samples, numbers, micro_batch_ids(micro, len(samples))))
    return plans


def replica_samples(plan: Sequence[MiniBatchPlan], replica: int) -> list[int]:
    """Global sample numbers that a replica trains on, in the order in which it stores them."""
    return [sample for mini in plan for part in mini.micro[replica] for sample in part]


def _broadcast_facts(batch: TrainBatch | None, layout: Layout) -> StepFacts:
    size = torch.tensor([0 if batch is None else batch.num_samples])
    layout.broadcast(size, layout.control_group)
    table = torch.empty(5, int(size), dtype=torch.float64)  # exact for integers below 2^53
    if batch is not None:
        rows = (batch.lengths, batch.num_loss_tokens, batch.rewards, batch.group_ids, batch.in_statistics)
        table = torch.from_numpy(np.stack([np.asarray(row, dtype=np.float64) for row in rows]))
    lengths, loss_tokens, rewards, groups, valid = layout.broadcast(table, layout.control_group).numpy()
    return StepFacts(
        lengths.astype(np.int64), loss_tokens.astype(np.int64), rewards, groups.astype(np.int64), valid.astype(bool)
    )


def _broadcast_tokens(
    batch: TrainBatch | None, samples: list[int], facts: StepFacts, group: object, layout: Layout
) -> TrainBatch:
    offsets = np.concatenate([[0], np.cumsum(facts.lengths[samples])]).astype(np.int64)
    part = select(batch, samples) if batch is not None else None

    def share(array: np.ndarray | None, dtype: torch.dtype) -> np.ndarray:
        tensor = torch.empty(int(offsets[-1]), dtype=dtype) if array is None else torch.from_numpy(array).to(dtype)
        return layout.broadcast(tensor.contiguous(), group).numpy()

    return TrainBatch(
        tokens=share(part and part.tokens, torch.int32),
        loss_mask=share(part and part.loss_mask, torch.uint8).astype(bool),
        rollout_logprobs=share(part and part.rollout_logprobs, torch.float32),
        offsets=offsets,
        rewards=facts.rewards[samples],
        group_ids=facts.group_ids[samples],
        in_statistics=facts.in_statistics[samples],
    )
