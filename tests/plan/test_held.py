"""What a rank holds: an actor's tensors to the byte, and the micro-batches that a stage has started."""

from __future__ import annotations

from typing import Any

import pytest

from dapo_mcore.plan.batch import batch_of
from dapo_mcore.plan.hardware import GPUS, Assumptions
from dapo_mcore.plan.held import critic_bytes, held_bytes, micro_batches_in_flight
from dapo_mcore.plan.host import host_memory
from dapo_mcore.plan.job import Cluster, make_job
from dapo_mcore.plan.parameters import stage_counts
from tests.plan.jobs import job

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("qwen2", {}),
    "bf16": ("qwen2", {"model__dtype": "bf16"}),
    "bf16, plain optimizer": ("qwen2", {"model__dtype": "bf16", "optimizer__distributed": False}),
    "tied, with a reference": ("qwen2, tied", {"model__dtype": "bf16", "algo__kl__coef": 0.1}),
    "experts": ("qwen2-moe", {"model__dtype": "bf16"}),
    "latent attention": ("deepseek-v3", {"model__dtype": "bf16"}),
    "with a critic": ("qwen2", {"algo__advantage": "gae"}),
    "tied, with a critic": ("qwen2, tied", {"algo__advantage": "gae", "critic__optimizer__distributed": False}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_actors_tensors_are_counted_to_the_byte(kind: str, alone: Any) -> None:
    from dapo_mcore.actor.actor import Actor
    from dapo_mcore.actor.checkpoint_blocks import checkpoint_blocks, written_blocks
    from dapo_mcore.actor.memory_use import MemoryUse
    from dapo_mcore.model_files.hf_folder import RandomReader
    from tests.actor import families, parity

    family, overrides = KINDS[kind]
    overrides = overrides | {"checkpoint__every": 1, "checkpoint__async_save": True}
    hf_config, config = families.hf_config(family), parity.make_config(parity.Mesh(), **overrides)
    actor = Actor(config, hf_config, alone, RandomReader(hf_config, 0))
    for optimizer in (actor.optimizer, *([actor.critic.optimizer] if actor.critic else ())):
        list(optimizer.shards())  # creates the state
    planned = make_job(config, hf_config, Cluster(GPUS["h100"], 1, 1), Assumptions())
    found = MemoryUse(actor).tensors()
    counts = stage_counts(planned, 0)
    held, critic = held_bytes(planned, counts), critic_bytes(planned, counts)
    assert held.pop("critic", 0) == sum(critic.values())
    held |= {name: held[name] + critic.get(name, 0) for name in ("parameters", "gradients", "optimizer")}
    assert {"weights": held.pop("parameters"), **held} == {name: found[name] for name in ("weights", *held)}
    saved = sum(block.data.nbytes for block in written_blocks(checkpoint_blocks(actor)))
    shape = planned.shape
    biases = (
        4 * shape.num_experts * sum(shape.moe_layers) if shape.key_rank else 0
    )  # DeepSeek's routing, not in the plan
    assert host_memory(planned, batch_of(planned)).parts["checkpoint"] == saved - biases


def test_a_stage_keeps_one_micro_batch_per_stage_that_follows_and_one() -> None:
    four = job(parallel__tensor_parallel=4, parallel__pipeline_parallel=4)
    assert [micro_batches_in_flight(four, stage, 20) for stage in range(4)] == [4, 3, 2, 1]
    assert micro_batches_in_flight(four, 0, 2) == 2
    turns = job(parallel__tensor_parallel=4, parallel__pipeline_parallel=4, parallel__virtual_pipeline_parallel=2)
    # chunks of half a stage: 2 per stage that follows, 4 of the first chunk, 1
    assert [micro_batches_in_flight(turns, stage, 20) for stage in range(4)] == [5.5, 4.5, 3.5, 2.5]
    assert micro_batches_in_flight(turns, 0, 4) == 4
