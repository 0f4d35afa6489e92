"""Sends one rollout step's samples from rank 0 to the data-parallel replicas that train on them.

Change here: which rank trains on which samples. Every rank gets the metadata of all samples, so all ranks compute the same
plan without further communication. Tokens go only to the replica that trains on them. Everything is sent as flat host
tensors over gloo, without pickles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dapo_mcore.actor.model.fp8_rules import token_multiple
from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.batch.collate import select
from dapo_mcore.batch.packing import micro_batch_ids, plan_micro_batches, split_mini_batches
from dapo_mcore.config.schema import Config
from dapo_mcore.types import TrainBatch


@dataclass(frozen=True)
class SampleMetadata:
    """What every rank knows about all B samples of the step: arrays [B] in the controller's sample order."""

    lengths: np.ndarray  # int64
    num_loss_tokens: np.ndarray  # int64
    rewards: np.ndarray  # float64
    group_ids: np.ndarray  # int64
    in_statistics: np.ndarray  # bool


@dataclass(frozen=True)
class MiniBatchPlan:
    """The samples of one gradient step, by their numbers within the rollout step.

    samples          int64 [n], the samples of all replicas
    micro            micro[replica][k]: the samples of that replica's k-th micro-batch
    micro_batch_ids  int64 [n], for each of `samples` the number of its micro-batch within the whole mini-batch
    """

    samples: np.ndarray
    micro: list[list[list[int]]]
    micro_batch_ids: np.ndarray


@dataclass(frozen=True)
class ScatteredStep:
    """A rollout step on one rank: all samples' metadata and the plan, and this replica's samples with their tokens.

    global_ids  int64 [n], the number within the rollout step of each sample in `batch`
    local_of    the inverse of global_ids
    """

    metadata: SampleMetadata
    plan: list[MiniBatchPlan]
    batch: TrainBatch
    global_ids: np.ndarray
    local_of: dict[int, int]


def scatter_step(
    batch: TrainBatch | None, config: Config, layout: Layout, *, mini_batch_prompts: int, seed: int | None
) -> ScatteredStep:
    """Return this rank's part of rank 0's `batch` (None elsewhere). Collectives: gloo broadcasts from rank 0."""
    metadata = _broadcast_metadata(batch, layout)
    plan = plan_step(metadata, config, layout, mini_batch_prompts, seed)
    for replica, group in enumerate(layout.replica_groups):
        samples = replica_samples(plan, replica)
        if group is not None:
            received = _broadcast_tokens(batch, samples, metadata, group, layout)
            if replica == layout.data_rank:
                own = received
    global_ids = np.array(replica_samples(plan, layout.data_rank), dtype=np.int64)
    local_of = {sample: i for i, sample in enumerate(global_ids.tolist())}
    return ScatteredStep(metadata, plan, own, global_ids, local_of)


def plan_step(
    metadata: SampleMetadata, config: Config, layout: Layout, mini_batch_prompts: int, seed: int | None
) -> list[MiniBatchPlan]:
    """Return the mini-batches: whole groups, balanced over replicas and split into micro-batches. Deterministic."""
    plans = []
    for samples in split_mini_batches(metadata.group_ids, mini_batch_prompts, seed, allow_ragged=True):
        micro = plan_micro_batches(
            metadata.lengths[samples],
            data_parallel=layout.data,
            context_parallel=layout.context,
            **packing_options(config),
        )
        numbers = [[samples[part].tolist() for part in rank] for rank in micro]
        plans.append(MiniBatchPlan(samples, numbers, micro_batch_ids(micro, len(samples))))
    return plans


def packing_options(config: Config) -> dict[str, int]:
    """Return the arguments of plan_micro_batches that the configuration alone decides."""
    return dict(
        max_tokens=config.batch.max_tokens,
        align=token_multiple(config.model, config.parallel),
        packing=config.batch.packing,
        multiple=config.parallel.micro_batch_multiple,
    )


def replica_samples(plan: Sequence[MiniBatchPlan], replica: int) -> list[int]:
    """Return the numbers of the samples that a replica trains on, in the order of its ScatteredStep.batch."""
    return [sample for mini in plan for part in mini.micro[replica] for sample in part]


def _broadcast_metadata(batch: TrainBatch | None, layout: Layout) -> SampleMetadata:
    """Return the metadata of rank 0's `batch` on every rank. Collectives: two gloo broadcasts."""
    size = torch.tensor([0 if batch is None else batch.num_samples])
    layout.broadcast(size, layout.control_group)
    table = torch.empty(5, int(size), dtype=torch.float64)  # exact for integers below 2^53
    if batch is not None:
        rows = (batch.lengths, batch.num_loss_tokens, batch.rewards, batch.group_ids, batch.in_statistics)
        table = torch.from_numpy(np.stack([np.asarray(row, dtype=np.float64) for row in rows]))
    lengths, loss_tokens, rewards, groups, valid = layout.broadcast(table, layout.control_group).numpy()
    return SampleMetadata(
        lengths.astype(np.int64), loss_tokens.astype(np.int64), rewards, groups.astype(np.int64), valid.astype(bool)
    )


def _broadcast_tokens(
    batch: TrainBatch | None, samples: list[int], metadata: SampleMetadata, group: object, layout: Layout
) -> TrainBatch:
    """Return `samples` of rank 0's `batch` on every rank of the gloo `group`. Collectives: three gloo broadcasts."""
    offsets = np.concatenate([[0], np.cumsum(metadata.lengths[samples])]).astype(np.int64)
    selected = select(batch, samples) if batch is not None else None

    def broadcast(array: np.ndarray | None, dtype: torch.dtype) -> np.ndarray:
        tensor = torch.empty(int(offsets[-1]), dtype=dtype) if array is None else torch.from_numpy(array).to(dtype)
        return layout.broadcast(tensor.contiguous(), group).numpy()

    return TrainBatch(
        tokens=broadcast(selected and selected.tokens, torch.int32),
        loss_mask=broadcast(selected and selected.loss_mask, torch.uint8).astype(bool),
        rollout_logprobs=broadcast(selected and selected.rollout_logprobs, torch.float32),
        offsets=offsets,
        rewards=metadata.rewards[samples],
        group_ids=metadata.group_ids[samples],
        in_statistics=metadata.in_statistics[samples],
    )
