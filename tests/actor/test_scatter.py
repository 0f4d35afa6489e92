"""Which replica trains on which samples, and what each of them receives. The ranks run one after the other."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch

from dapo_mcore.actor.scatter import SampleMetadata, plan_step, replica_samples, scatter_step
from dapo_mcore.types import TrainBatch
from tests.actor.parity import Mesh, make_config

CONFIG = make_config(Mesh(data=2), batch__max_tokens=16, data__max_prompt_tokens=8, rollout__max_response_tokens=8)
LENGTHS = [9, 7, 5, 6, 8, 3, 4, 2]


def train_batch() -> TrainBatch:
    """Return four groups of two samples. Token t is 100·sample + its position, and the last token carries loss."""
    offsets = np.array([0, *np.cumsum(LENGTHS)])
    sample = np.repeat(np.arange(8), LENGTHS)
    position = np.arange(offsets[-1]) - offsets[sample]
    return TrainBatch(
        tokens=(100 * sample + position).astype(np.int32),
        loss_mask=position == np.array(LENGTHS)[sample] - 1,
        rollout_logprobs=(-sample / 8).astype(np.float32),
        offsets=offsets,
        rewards=np.arange(8) / 4,
        group_ids=np.arange(8) // 2,
        in_statistics=np.arange(8) != 5,
    )


@dataclass
class Replay:
    """A layout of two replicas with one rank each. Rank 0 runs first; rank 1 then receives what rank 0 has sent.

    replica_groups[d] holds rank 0 and the rank of replica d, so rank 1 is not in the first.
    """

    data_rank: int = 0
    data: int = 2
    context: int = 1
    tensor: int = 1
    control_group: str = "all"
    sent: dict[str, deque[torch.Tensor]] = field(default_factory=lambda: {"all": deque(), "1": deque()})

    @property
    def replica_groups(self) -> tuple[str | None, str]:
        return ("0" if self.data_rank == 0 else None), "1"

    def broadcast(self, tensor: torch.Tensor, group: str) -> torch.Tensor:
        if self.data_rank == 0:
            if group in self.sent:
                self.sent[group].append(tensor.clone())
            return tensor
        received = self.sent[group].popleft()
        assert (received.shape, received.dtype) == (tensor.shape, tensor.dtype), "every rank must know what comes"
        return tensor.copy_(received)


def metadata(lengths: list[int]) -> SampleMetadata:
    count = len(lengths)
    return SampleMetadata(
        np.array(lengths), np.ones(count, np.int64), np.zeros(count), np.arange(count) // 2, np.ones(count, bool)
    )


def test_the_plan_has_whole_groups_balanced_over_replicas_within_the_token_limit():
    first, second = plan_step(metadata(LENGTHS), CONFIG, Replay(), mini_batch_prompts=2, seed=None)
    assert first.samples.tolist() == [0, 1, 2, 3] and second.samples.tolist() == [4, 5, 6, 7]
    # 9 + 5 against 7 + 6 tokens, and 3 + 4 + 2 against 8: the larger sum first, each in one micro-batch of 16 tokens
    assert first.micro == [[[0, 2]], [[1, 3]]]
    assert second.micro == [[[5, 6, 7]], [[4]]]
    assert first.micro_batch_ids.tolist() == [0, 1, 0, 1] and second.micro_batch_ids.tolist() == [1, 0, 0, 0]
    assert replica_samples([first, second], 0) == [0, 2, 5, 6, 7]


def test_every_replica_has_as_many_micro_batches_as_the_one_that_needs_most():
    """A pipeline needs equal numbers on all replicas, so a replica may have an empty one."""
    (plan,) = plan_step(metadata([15, 15, 15, 2]), CONFIG, Replay(), mini_batch_prompts=2, seed=None)
    assert len(plan.micro[0]) == len(plan.micro[1]) == 2
    assert sorted(sample for rank in plan.micro for part in rank for sample in part) == [0, 1, 2, 3]


def test_an_interleaved_pipeline_gets_its_micro_batches_in_groups_of_its_stages():
    mesh = Mesh(pipeline=3, virtual=2, data=2)
    config = make_config(mesh, batch__max_tokens=16, data__max_prompt_tokens=8, rollout__max_response_tokens=8)
    (plan,) = plan_step(metadata([15, 15, 15, 2]), config, Replay(), mini_batch_prompts=2, seed=None)
    assert [len(rank) for rank in plan.micro] == [3, 3]
    assert sorted(sample for rank in plan.micro for part in rank for sample in part) == [0, 1, 2, 3]


def test_a_seed_shuffles_whole_groups():
    plans = plan_step(metadata([4] * 40), CONFIG, Replay(), mini_batch_prompts=5, seed=3)
    orders = [plan.samples.tolist() for plan in plans]
    assert sorted(sample for order in orders for sample in order) == list(range(40)) and orders[0] != list(range(10))
    assert all(order[i] + 1 == order[i + 1] for order in orders for i in range(0, 10, 2))
    again = plan_step(metadata([4] * 40), CONFIG, Replay(), mini_batch_prompts=5, seed=3)
    assert orders == [plan.samples.tolist() for plan in again]


def test_each_replica_receives_its_own_samples_and_the_metadata_of_all():
    batch, controller = train_batch(), Replay()
    first = scatter_step(batch, CONFIG, controller, mini_batch_prompts=2, seed=None)
    second = scatter_step(None, CONFIG, Replay(1, sent=controller.sent), mini_batch_prompts=2, seed=None)
    assert not any(controller.sent.values()), "everything that was sent was expected"
    assert first.global_ids.tolist() == [0, 2, 5, 6, 7] and second.global_ids.tolist() == [1, 3, 4]
    for step in (first, second):
        assert step.metadata.lengths.tolist() == LENGTHS and step.metadata.num_loss_tokens.tolist() == [1] * 8
        assert step.metadata.rewards.tolist() == batch.rewards.tolist()
        assert step.metadata.in_statistics.tolist() == batch.in_statistics.tolist()
        assert step.metadata.group_ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert [plan.micro for plan in step.plan] == [plan.micro for plan in first.plan]
        for local, sample in enumerate(step.global_ids.tolist()):
            assert step.local_of[sample] == local
            where = slice(step.batch.offsets[local], step.batch.offsets[local + 1])
            assert step.batch.tokens[where].tolist() == [100 * sample + t for t in range(LENGTHS[sample])]
            assert step.batch.loss_mask[where].tolist() == [False] * (LENGTHS[sample] - 1) + [True]
            assert set(step.batch.rollout_logprobs[where].tolist()) == {-sample / 8}
            assert step.batch.rewards[local] == sample / 4
