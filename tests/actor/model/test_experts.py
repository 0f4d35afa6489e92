"""DAPO's gradient through experts, with a load-balancing loss and with routes replayed: the whole actor on every kind of expert
mesh, against an fp64 run of transformers.

Single losses of single families: test_policy.py. Here the packing, the head and the objective are the actor's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dapo_mcore.types import TrainBatch
from tests.actor import families, parity
from tests.actor.parity import Mesh

TOLERANCE = 1e-6
COEF = 0.5
SETTINGS: dict[str, dict[str, Any]] = {
    "mixtral": {"model__recompute": ["moe"]},
    "qwen2-moe": {"batch__packing": False, "batch__max_tokens": 400},
    "qwen3-moe": {"batch__max_tokens": 48, "model__recompute": "full"},
}
"""Families, with settings that the gradient must not depend on."""

DEEP = "qwen3-moe"
"""The family with four layers, enough for two interleaved stages."""

Routes = dict[str, list[torch.Tensor]]
"""By router: the experts of each call's tokens, int64 [T, K]."""


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {name: solve(name, tmp_path_factory.mktemp("experts")) for name in SETTINGS}


def solve(name: str, folder: Any) -> str:
    """Write a file with the family's problem, an off-policy batch and HF-named fp64 gradients. Return its path.

    balanced  of DAPO's loss and the load-balancing loss, whose value is aux_loss
    replayed  the same after the routers have changed, with the routes from before
    """
    from transformers import AutoModelForCausalLM

    problem = str(families.save_problem(name, folder, num_hidden_layers=4 if name == DEEP else 3))
    model = AutoModelForCausalLM.from_pretrained(
        folder / "weights", dtype=torch.float64, experts_implementation="eager"
    )
    families.compute_in_fp64(model)
    batch = parity.off_policy(parity.make_batch(), model)
    with routed(model) as (logits, routes):
        loss = dapo_loss(model, batch)
        aux_loss = balance_loss(logits, routes, batch)
    stored = {"problem": problem, "aux_loss": aux_loss.item()}
    stored["balanced"] = gradient(model, loss + COEF * len(routes) * aux_loss, folder)
    with torch.no_grad():
        for router in routers(model).values():
            router.weight.copy_(router.weight.roll(1, 0))
    with routed(model, routes) as (logits, again):
        loss = dapo_loss(model, batch)
        loss = loss + COEF * len(routes) * balance_loss(logits, again, batch)
    stored["replayed"] = gradient(model, loss, folder)
    stored["batch"] = {field: getattr(batch, field) for field in batch.__dataclass_fields__}
    path = folder / "dapo.pt"
    torch.save(stored, path)
    return str(path)


def dapo_loss(model: torch.nn.Module, batch: TrainBatch) -> torch.Tensor:
    return parity.dapo_loss(model, batch, 0.2, 0.28, 3.0)


def gradient(model: torch.nn.Module, loss: torch.Tensor, folder: Any) -> dict[str, torch.Tensor]:
    """Return the loss's gradient, named as on disk."""
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        kept = [parameter.clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        model.save_pretrained(folder / "gradient")
        for parameter, weight in zip(model.parameters(), kept, strict=True):
            parameter.copy_(weight)
    return load_file(folder / "gradient/model.safetensors")


def routers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.named_modules() if type(module).__name__.endswith("TopKRouter")}


@contextmanager
def routed(model: torch.nn.Module, replayed: Routes | None = None) -> Iterator[tuple[Routes, Routes]]:
    """Yield (logits [T, E], routes [T, K]) of each call of each router in the block, which takes the `replayed` routes if given."""
    found: tuple[Routes, Routes] = {}, {}

    def follow(name: str, module: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits, chosen, indices = output
        if replayed is not None:
            indices = replayed[name][len(found[1].get(name, []))]
            chosen = logits.softmax(-1).gather(1, indices)
            if getattr(module, "norm_topk_prob", True):
                chosen = chosen / chosen.sum(-1, keepdim=True)
        for kept, value in zip(found, (logits, indices), strict=True):
            kept.setdefault(name, []).append(value)
        return logits, chosen, indices

    hooks = [
        module.register_forward_hook(lambda module, _, output, name=name: follow(name, module, output))
        for name, module in routers(model).items()
    ]
    yield found
    for hook in hooks:
        hook.remove()


def balance_loss(logits: Routes, routes: Routes, batch: TrainBatch) -> torch.Tensor:
    """Return the loss in its plainest form, mean over layers and over samples with a loss token. One router call per sample."""
    terms = []
    for name, calls in logits.items():
        for sample, (own, indices) in enumerate(zip(calls, routes[name], strict=True)):
            if batch.loss_mask[batch.offsets[sample] : batch.offsets[sample + 1]].any():
                loads = torch.bincount(indices.flatten(), minlength=own.size(1)) / indices.numel()
                terms.append(own.size(1) * (loads * own.softmax(-1).mean(0)).sum())
    assert len(terms) == len(logits) * int((np.add.reduceat(batch.loss_mask, batch.offsets[:-1]) > 0).sum())
    return torch.stack(terms).mean()


@pytest.mark.parametrize(
    "mesh",
    [
        Mesh(data=2, expert=2),
        Mesh(tensor=2, sequence_parallel=True, expert=2),
        Mesh(tensor=2, sequence_parallel=True),
        Mesh(context=2, pipeline=2, expert=2),
        Mesh(pipeline=2, virtual=2),
    ],
    ids=str,
)
def test_the_gradient_is_that_of_one_fp64_process(mesh: Mesh, problems: dict[str, str]) -> None:
    names = [DEEP] if mesh.virtual > 1 else list(SETTINGS)
    found = parity.spawn(errors, mesh, {name: problems[name] for name in names})
    for name in names:
        assert max(found[name]["balanced"], found[name]["replayed"]) <= TOLERANCE, (name, found[name])
        assert found[name]["aux_loss"] == pytest.approx(found[name]["expected aux_loss"], rel=1e-6), name
        assert found[name]["rerouted"], "the changed routers would choose other experts"


def errors(layout: Any, mesh: Mesh, paths: dict[str, str]) -> dict[str, dict[str, float]]:
    """Return each family's largest ‖Δ‖₂ / ‖g‖₂ over tensors for each of its gradients. Runs in a worker."""
    from dapo_mcore.actor.actor import Actor
    from dapo_mcore.actor.model.routing import routers

    found = {}
    for name, path in paths.items():
        stored = torch.load(path, weights_only=False)  # this test has written the file itself
        problem, batch = families.load_problem(stored["problem"]), TrainBatch(**stored["batch"])

        options = dict(model__moe_aux_loss_coef=COEF, model__routing_replay="scoring", algo__max_mismatch=100.0)
        config = parity.make_config(mesh, **SETTINGS[name], **options)
        actor = Actor(config, problem.hf_config, layout, parity.DictReader(problem.weights))
        mini_batch = parity.shared_step(config, layout, batch, actor)[0]
        row = found[name] = {"expected aux_loss": stored["aux_loss"]}
        row["balanced"] = error(actor, mini_batch, stored["balanced"])
        row["aux_loss"] = layout.sum_over_ranks(actor.take_aux_loss()).item()
        old = [micro.old_logprobs for micro in mini_batch]
        scored = [micro.with_(old_logprobs=kept) for micro, kept in zip(actor.score(mini_batch), old, strict=True)]
        for router in routers(actor.policy):
            router.weight.data = router.weight.data.roll(1, 0)
        own = actor.score(mini_batch)
        row["rerouted"] = all(not torch.equal(a.routes[n], b.routes[n]) for a, b in zip(own, scored) for n in a.routes)
        row["replayed"] = error(actor, scored, stored["replayed"])
    return found


def error(actor: Any, mini_batch: list[Any], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest ‖Δ‖₂ / ‖g‖₂ over tensors. Unused experts must have no gradient."""
    found = parity.gradient_of(actor, mini_batch)
    if not actor.layout.is_controller:
        return 0.0
    assert found.keys() == expected.keys()
    unused = [name for name in expected if not expected[name].any()]
    assert not any(found[name].any() for name in unused)
    used = {name: expected[name] for name in expected if name not in unused}
    return parity.worst({name: found[name] for name in used}, used)
