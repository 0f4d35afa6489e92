"""DistributedDataParallel of a trained model: which gradient buffers it gets from the settings."""

from __future__ import annotations

import pytest
import torch

from dapo_mcore.actor.wrap import wrap
from tests.actor import parity
from tests.actor.parity import Mesh


@pytest.mark.parametrize("distributed", [True, False])
def test_each_model_is_wrapped_for_its_own_optimizer(alone, distributed):
    config = parity.make_config(
        Mesh(),
        algo__advantage="gae",
        critic__optimizer__distributed=distributed,
        optimizer__distributed=not distributed,
        parallel__overlap_grad_reduce=True,
    )
    actor = parity.build_actor(config, alone)
    for model, optimizer in ((actor.ddp, config.optimizer), (actor.critic.ddp, config.critic.optimizer)):
        (chunk,) = model
        assert chunk.ddp_config.use_distributed_optimizer == optimizer.distributed
        assert {buffer.grad_dtype for buffer in chunk.buffers} == {torch.float32}


def test_overlapped_sums_wait_for_the_last_micro_batch(alone):
    config = parity.make_config(Mesh(), parallel__overlap_grad_reduce=True)
    policy = parity.build_actor(config, alone).policy
    (chunk,) = wrap(policy, config.parallel, config.optimizer)
    assert chunk.bucket_groups[0].is_last_microbatch
    with policy.config.no_sync_func():
        assert not chunk.bucket_groups[0].is_last_microbatch
    assert chunk.bucket_groups[0].is_last_microbatch
