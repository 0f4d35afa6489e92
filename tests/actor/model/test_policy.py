"""Every family on meshes of real processes: logits, gradients and their norm against an fp64 run of transformers.

Proves: real megatron-core in fp32 on gloo, with experts as separate MLPs; packed and unpacked micro-batches.
Does not prove: Transformer Engine's grouped experts, NCCL, bf16.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from tests.actor import families, parity
from tests.actor.cross_entropy import cross_entropy, held_positions, micro_batch, own_batches
from tests.actor.families import FAMILIES, Problem
from tests.actor.parity import Mesh

GRADIENT_TOLERANCE = 1e-6  # per tensor, ‖Δ‖₂ / ‖g‖₂

DENSE = ["qwen2", "qwen2, tied", "qwen2, yarn", "qwen3", "llama", "llama, linear", "mistral"]
EXPERTS = ["mixtral", "qwen2-moe", "qwen3-moe", "qwen3-moe, sparse", "deepseek-v3", "deepseek-v3, no groups"]

MESHES = [
    (Mesh(), [*DENSE, *EXPERTS]),
    (Mesh(tensor=2, sequence_parallel=True), [*DENSE, *EXPERTS]),
    (Mesh(tensor=2), ["llama, one key-value head", "mistral"]),
    (Mesh(pipeline=2), [*DENSE, *EXPERTS]),  # three layers: uneven stages
    (Mesh(data=2, expert=2), EXPERTS),
    (Mesh(data=2), EXPERTS),
    (Mesh(tensor=2, sequence_parallel=True, expert=2), EXPERTS),
    (Mesh(tensor=2, data=2, sequence_parallel=True, expert=2, expert_tensor=2), EXPERTS),
    (Mesh(context=2, pipeline=2, expert=2), EXPERTS),
    (Mesh(context=2, pipeline=2, virtual=2, expert=2), ["deepseek-v3, four layers"]),
    (Mesh(pipeline=4), ["qwen2, seven layers"]),
    (Mesh(tensor=4), ["llama, eight heads", "qwen3", "llama, one key-value head"]),
    (Mesh(tensor=2, context=2, sequence_parallel=True), ["llama, one key-value head", "qwen3-moe"]),
]


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> dict[str, str]:
    folders = {name: tmp_path_factory.mktemp("family") for name in FAMILIES}
    deep = families.save_problem("deepseek-v3", tmp_path_factory.mktemp("family"), num_hidden_layers=4)
    found = {name: str(families.save_problem(name, folder)) for name, folder in folders.items()}
    return found | {"deepseek-v3, four layers": str(deep)}


@pytest.mark.parametrize(("mesh", "names"), MESHES, ids=[str(mesh) for mesh, _ in MESHES])
def test_logits_and_gradients_equal_the_fp64_run_of_transformers(mesh, names, problems):
    for row in parity.spawn(compare_all, mesh, {name: problems[name] for name in names}):
        name = row.pop("name")
        assert row["logits_max"] <= 2 * row["own_max"], (name, row)
        assert row["logits_norm"] <= 2 * row["own_norm"], (name, row)
        assert row["gradient"] <= GRADIENT_TOLERANCE, (name, row)
        for distributed in (False, True):
            assert row[f"norm, distributed {distributed}"] <= GRADIENT_TOLERANCE, (name, row)


def compare_all(layout: Any, mesh: Mesh, paths: dict[str, str]) -> list[dict[str, Any]]:
    """Worker."""
    return [{"name": name} | compare(layout, mesh, families.load_problem(path)) for name, path in paths.items()]


def compare(layout: Any, mesh: Mesh, problem: Problem) -> dict[str, Any]:
    found: dict[str, Any] = {"own_max": problem.errors[0], "own_norm": problem.errors[1]}
    norm = sum(float(g.square().sum()) for g in problem.gradients.values()) ** 0.5
    for distributed in (False, True):
        config = parity.make_config(mesh, optimizer__distributed=distributed, optimizer__clip_grad=norm / 2)
        policy, outcomes, found_norm = one_step(config, problem, layout)
        found[f"norm, distributed {distributed}"] = abs(found_norm / norm - 1)
        if not distributed:  # the distributed optimizer leaves each rank a shard of the gradients
            found |= logits_errors(problem, outcomes, layout)
            found["gradient"] = worst_ratio(gradient_sums(policy, problem, layout, norm / 2 / (norm + 1e-6)), layout)
    return found


def one_step(config: Any, problem: Problem, layout: Any) -> tuple[Any, list[Any], float]:
    """Take a gradient step on the problem. Return the policy, its logits and the gradient norm."""
    from dapo_mcore.actor.forward_backward import run_micro_batches
    from dapo_mcore.actor.model.policy import build_policy
    from dapo_mcore.actor.optimizer import Optimizer
    from dapo_mcore.actor.wrap import wrap

    policy = build_policy(config, problem.hf_config, layout)
    families.fill(policy, problem, layout)
    ddp = wrap(policy, config.parallel, config.optimizer)
    optimizer = Optimizer(ddp, config.optimizer, torch.float32)
    for chunk in ddp:
        chunk.zero_grad_buffer()
    batches = [micro_batch(problem, batch, layout) for batch in own_batches(layout)]
    outcomes = run_micro_batches(ddp, batches, partial(cross_entropy, layout=layout), layout, backward=True)
    norm = optimizer.prepare()
    optimizer.step(norm)
    return policy, outcomes, norm


def logits_errors(problem: Problem, outcomes: list[Any], layout: Any) -> dict[str, float]:
    errors = [
        out["logits"].double() - problem.logits[batch][held_positions(batch, layout)]
        for batch, out in zip(own_batches(layout), outcomes)
    ]
    largest = torch.tensor([max((float(e.abs().max()) for e in errors), default=0.0)])
    squares = torch.tensor([sum(float(e.square().sum()) for e in errors) * layout.reports_loss], dtype=torch.float64)
    return {
        "logits_max": float(layout.max_over_ranks(largest)),
        "logits_norm": float(layout.sum_over_ranks(squares)) ** 0.5,
    }


def gradient_sums(policy: Any, problem: Problem, layout: Any, scale: float) -> dict[str, tuple[float, float]]:
    """Return parameter name → (‖Δ‖², ‖g‖²) of this rank's part. Clipping scales the expected gradient by `scale`."""
    sums = {}
    for name, parameter in policy.named_weights():
        if not parameter.requires_grad:
            continue
        expected = scale * families.megatron_part(name, problem.gradients, problem.hf_config, layout)
        delta = parameter.main_grad.double() - expected
        sums[name] = (float(delta.square().sum()), float(expected.square().sum()))
    return sums


def worst_ratio(sums: dict[str, tuple[float, float]], layout: Any) -> float:
    """Return the largest ‖Δ‖ / ‖g‖ over parameters, each over all ranks with a part of it.

    An expert that no token chose has no gradient, so it must have none here.
    """
    import torch.distributed as dist

    everywhere: list[Any] = [None] * layout.world_size
    dist.all_gather_object(everywhere, sums, group=layout.control_group)
    ratios = {}
    for name in {name for rank in everywhere for name in rank}:
        wrong, whole = (sum(rank[name][i] for rank in everywhere if name in rank) for i in (0, 1))
        ratios[name] = (wrong / whole) ** 0.5 if whole else float(wrong > 0)
    return max(ratios.values())
