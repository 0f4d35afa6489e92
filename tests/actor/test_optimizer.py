"""Optimizer state of experts: saved by one mesh, continued by others. Dense models: tests/weights/test_checkpoint.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.actor import families, parity, test_model
from tests.actor.parity import Mesh

METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("experts")
    problem = families.save_problem("qwen2-moe", folder)
    # experts distributed: upstream chains two optimizers
    norms = parity.spawn(train, Mesh(data=2, expert=2), str(problem), str(folder), "save")
    return {"problem": str(problem), "folder": str(folder), "norms": norms}


@pytest.mark.parametrize(
    "mesh",
    [Mesh(tensor=2, sequence_parallel=True), Mesh(pipeline=2), Mesh(tensor=2, sequence_parallel=True, expert=2)],
    ids=str,
)
def test_experts_continue_on_another_mesh_with_their_moments(mesh, saved):
    continued = parity.spawn(train, mesh, saved["problem"], saved["folder"], "load")
    for expected, found in zip(saved["norms"], continued, strict=True):
        assert found == pytest.approx(expected[-2:], rel=1e-6)


def train(layout: Any, mesh: Mesh, problem: str, folder: str, action: str) -> list[list[float]]:
    """Worker: gradient norms without and with the distributed optimizer; four steps with a checkpoint in the middle, or the
    last two of them from that checkpoint."""
    return [train_one(layout, mesh, problem, Path(folder), action, distributed) for distributed in (False, True)]


def train_one(layout: Any, mesh: Mesh, path: str, folder: Path, action: str, distributed: bool) -> list[float]:
    from megatron.core import dist_checkpointing

    from dapo_mcore.actor.actor import wrap
    from dapo_mcore.actor.model import build_model
    from dapo_mcore.actor.optimizer import Optimizer

    problem, checkpoint = families.load_problem(path), folder / f"distributed_{distributed}"
    config = parity.make_config(mesh, optimizer__distributed=distributed)
    policy = build_model(config, problem.hf_config, layout)
    families.fill(policy, problem, layout)
    ddp = wrap(policy, config)
    optimizer = Optimizer(ddp, config.optimizer, torch.float32)

    def state(loading: bool) -> dict[str, Any]:
        policy_state = policy.sharded_state_dict(metadata=METADATA)
        return {
            "policy": policy_state,
            "optimizer": optimizer.sharded_state(policy_state, METADATA, loading=loading),
        }

    norms = [] if action == "load" else [step(ddp, optimizer, problem, layout) for _ in range(2)]
    if action == "load":
        for parameter in policy.parameters():
            parameter.data.zero_()
        stored = dist_checkpointing.load(state(loading=True), str(checkpoint))
        policy.load_state_dict(stored["policy"])
        optimizer.load_state(stored["optimizer"])
    else:
        layout.controller_first(lambda: checkpoint.mkdir())
        dist_checkpointing.save(state(loading=False), str(checkpoint))
    return norms + [step(ddp, optimizer, problem, layout) for _ in range(2)]


def step(ddp: Any, optimizer: Any, problem: Any, layout: Any) -> float:
    from dapo_mcore.actor.step import run_micro_batches

    ddp.zero_grad_buffer()
    optimizer.megatron.zero_grad()
    batches = [test_model.micro_batch(problem, batch, layout) for batch in test_model.own_batches(layout)]
    run_micro_batches(ddp, batches, partial(test_model.cross_entropy, layout=layout), layout, backward=True)
    norm = optimizer.prepare()
    optimizer.step(norm)
    return norm
