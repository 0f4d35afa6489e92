"""The actor's memory on the host and back: training continues bitwise, on every mesh, with every kind of optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dapo_mcore.actor import memory
from dapo_mcore.actor.memory_use import GIB, MemoryUse
from dapo_mcore.plan.hardware import Assumptions
from dapo_mcore.plan.held import held_bytes
from dapo_mcore.plan.host import away_bytes
from dapo_mcore.plan.job import Cluster, Job, make_job
from dapo_mcore.plan.parameters import stage_counts
from tests.actor import parity
from tests.actor.parity import Mesh
from tests.tools.fake_transformer_engine import Float8CurrentScaling, Format, Linear, autocast

KINDS = {
    "fp32 distributed": {},
    "fp32": {"optimizer__distributed": False},
    "bf16 distributed": {"model__dtype": "bf16"},
    "bf16": {"model__dtype": "bf16", "optimizer__distributed": False},
    "with a reference": {"algo__kl__coef": 0.1},
}


LAYER = 64 + 128 * 64 + 128 + 64 * 64 + 64 + 192 * 64 + 64 * 96  # norm, qkv and its bias, o, norm, gate and up, down
HALF = 64 + 64 * 64 + 64 + 64 * 32 + 64 + 96 * 64 + 64 * 48
LARGEST = {
    Mesh(data=2): 2 * 64 * 64 + 4 * LAYER + 64,
    Mesh(tensor=2, sequence_parallel=True): 2 * 32 * 64 + 4 * HALF + 64,
    Mesh(pipeline=2): 2 * LAYER + 64 + 64 * 64,
}
"""By mesh, the parameters of the rank with most: the vocabulary of 61 words is padded to 64, and the last of two stages has
the last norm, too."""


def by_hand(mesh: Mesh, kind: str) -> dict[str, int]:
    """Return bytes. The distributed optimizer's buffers are padded to 128 elements, and each replica has Adam's state of one
    part of them."""
    num, bf16, divided = LARGEST[mesh], "bf16" in kind, kind != "fp32" and kind != "bf16"
    padded = -(-num // 128) * 128 if divided else num
    updated = padded // mesh.data if divided and mesh.data > 1 else num
    bytes_of = {
        "weights": padded * (2 if bf16 else 4),
        "gradients": padded * 4,
        "optimizer": updated * (12 if bf16 else 8),
        "head": 1024 * 64 // mesh.tensor * 4,
    }
    return bytes_of | ({"reference": num * 4} if "reference" in kind else {})


@pytest.mark.parametrize("mesh", LARGEST, ids=str)
def test_training_continues_bitwise_and_the_memory_is_free_meanwhile(mesh: Mesh) -> None:
    for kind, told in parity.spawn(train, mesh).items():
        assert told["away"] == told["stayed"], kind
        assert told["use"] == {f"memory/{name}_gib": size / GIB for name, size in by_hand(mesh, kind).items()}, kind
        assert planned(mesh, KINDS[kind]) == {name: told["use"].get(f"memory/{name}_gib", 0) for name in HELD}, kind
        assert told["bytes"]["all gone"] == 0, kind
        assert planned_on_host(mesh, KINDS[kind]) == told["bytes"]["host"], kind
        assert 0 < told["bytes"]["weights"] < 0.7 * told["bytes"]["all"], kind
        assert told["stream is the same"], kind


HELD = ("weights", "gradients", "optimizer", "reference")


def planned_job(mesh: Mesh, overrides: dict[str, Any]) -> Job:
    cluster = Cluster(gpus_per_node=mesh.world_size, nodes=1)
    return make_job(parity.make_config(mesh, **overrides), parity.hf_config(), cluster, Assumptions())


def planned(mesh: Mesh, overrides: dict[str, Any]) -> dict[str, float]:
    """Return what `dapo-mcore plan` says that the fullest rank holds, in GiB."""
    job = planned_job(mesh, overrides)
    stages = [held_bytes(job, stage_counts(job, stage)).values() for stage in range(mesh.pipeline)]
    return {name: max(held) / GIB for name, held in zip(HELD, zip(*stages))}


def planned_on_host(mesh: Mesh, overrides: dict[str, Any]) -> int:
    """Return what `dapo-mcore plan` says that the fullest rank's actor takes of a host whose memory is not pinned."""
    job = planned_job(mesh, overrides)
    return max(sum(away_bytes(job, stage_counts(job, stage))) for stage in range(mesh.pipeline))


def train(layout: Any, mesh: Mesh) -> dict[str, Any]:
    """Return, per kind, gradient norms and the weights' sum of three steps, with and without offloading. Runs in a worker."""
    return {kind: compare(layout, mesh, overrides) for kind, overrides in KINDS.items()}


def compare(layout: Any, mesh: Mesh, overrides: dict[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = {"bytes": {}, "stream is the same": True}
    for way in ("stayed", "away"):
        config = parity.make_config(mesh, **overrides)
        actor = parity.build_actor(config, layout)
        kept = memory.ActorMemory(actor)
        told[way] = []
        for step in range(parity.STEPS):
            if way == "away" and step:
                go_away_and_return(actor, kept, told)
            (mini_batch,) = parity.shared_step(config, layout, parity.make_batch(seed=step), actor)
            told[way].append(actor.update(mini_batch).grad_norm)
        told[way].append(checksum(actor.policy))
        told["use"] = MemoryUse(actor).metrics()
    return told


def go_away_and_return(actor: Any, kept: memory.ActorMemory, told: dict[str, Any]) -> None:
    from dapo_mcore.actor.weight_stream import WeightStream

    stream = WeightStream(actor.policy, actor.shape, actor.layout)
    before = [(name, tensor.clone()) for name, tensor in stream()]
    told["bytes"]["all"] = kept.nbytes
    kept.offload_state()
    told["bytes"]["weights"] = kept.nbytes
    after = list(stream())
    told["stream is the same"] &= all(torch.equal(a[1], b[1]) for a, b in zip(before, after, strict=True))
    del after
    kept.offload_weights()
    told["bytes"]["all gone"] = kept.nbytes
    # on a CPU the step counts of torch's AdamW move, too
    steps = sum(tensor.nbytes for tensor in actor.optimizer.tensors() if not tensor.dim())
    most = actor.layout.max_over_ranks(torch.tensor([kept.host_nbytes - steps]))
    told["bytes"]["host"] = int(most)
    kept.onload()


def test_fp8_copies_of_weights_are_free_meanwhile_and_are_cast_again(alone: Any) -> None:
    actor = parity.build_actor(parity.make_config(Mesh(), algo__kl__coef=0.1), alone)
    layers = [Linear(32, 16, bias=False, params_dtype=torch.float32, device="cpu") for _ in range(2)]
    for model, layer in zip((actor.policy, actor.reference), layers, strict=True):
        model.append(layer)
    hidden, kept = torch.randn(3, 32), memory.ActorMemory(actor)
    with autocast(enabled=True, recipe=Float8CurrentScaling(fp8_format=Format.E4M3)):
        before = [layer(hidden, is_first_microbatch=True) for layer in layers]
        kept.offload_state()
        assert [layer._fp8_workspaces for layer in layers] == [{}, {}]
        kept.offload_weights()
        kept.onload()
        after = [layer(hidden, is_first_microbatch=False) for layer in layers]
    assert all(torch.equal(first, again) for first, again in zip(before, after, strict=True))


def test_a_critic_goes_away_too_and_goes_on_bitwise(alone: Any) -> None:
    config = parity.make_config(Mesh(), algo__advantage="gae", critic__optimizer={"lr": 1e-3})
    stayed, away = (parity.build_actor(config, alone) for _ in range(2))
    kept, found = memory.ActorMemory(away), []
    for actor in (stayed, away):
        norms = []
        for step in range(2):
            if actor is away and step:
                kept.offload_state()
                kept.offload_weights()
                assert sum((MemoryUse(away).tensors() | {"head": 0}).values()) == 0
                kept.onload()
            (mini_batch,) = parity.shared_step(config, alone, parity.make_batch(seed=step), actor)
            norms.append(actor.critic.update(mini_batch).grad_norm)
        found.append([*norms, checksum(actor.critic.model)])
    assert found[0] == found[1] and found[0][0] != found[0][1]


def checksum(policy: Any) -> float:
    return sum(float(parameter.double().sum()) for parameter in policy.parameters())
