"""DAPO's gradient through experts: the whole actor on every kind of expert mesh, against an fp64 run of transformers.

Single losses of single families: test_policy.py. Here the packing, the head and the objective are the actor's own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.actor import families, parity
from tests.actor.parity import Mesh

TOLERANCE = 1e-6
FAMILIES = ("mixtral", "qwen2-moe", "qwen3-moe")


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [solve(name, tmp_path_factory.mktemp("experts")) for name in FAMILIES]


def solve(name: str, folder: Any) -> str:
    """Write a file with the family's problem, an off-policy batch and its HF-named fp64 gradient. Return its path."""
    from transformers import AutoModelForCausalLM

    problem = str(families.save_problem(name, folder))
    model = AutoModelForCausalLM.from_pretrained(
        folder / "weights", dtype=torch.float64, experts_implementation="eager"
    )
    families.compute_in_fp64(model)
    batch = parity.off_policy(parity.make_batch(), model)
    parity.dapo_loss(model, batch, 0.2, 0.28, 3.0).backward()
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    model.save_pretrained(folder / "expected")
    fields = {field: getattr(batch, field) for field in batch.__dataclass_fields__}
    path = folder / "dapo.pt"
    torch.save(
        {"problem": problem, "batch": fields, "expected": load_file(folder / "expected/model.safetensors")}, path
    )
    return str(path)


@pytest.mark.parametrize(
    "mesh",
    [
        Mesh(data=2, expert=2),
        Mesh(tensor=2, sequence_parallel=True, expert=2),
        Mesh(tensor=2, sequence_parallel=True),
        Mesh(context=2, pipeline=2, expert=2),
    ],
    ids=str,
)
def test_the_gradient_is_that_of_one_fp64_process(mesh: Mesh, problems: list[str]) -> None:
    found = parity.spawn(worst_errors, mesh, problems)
    assert all(error <= TOLERANCE for error in found), dict(zip(FAMILIES, found))


def worst_errors(layout: Any, mesh: Mesh, paths: list[str]) -> list[float]:
    """Return each family's largest ‖Δ‖₂ / ‖g‖₂ over tensors. Unused experts must have no gradient. Runs in a worker."""
    from dapo_mcore.actor.actor import Actor
    from dapo_mcore.types import TrainBatch

    found = []
    for path in paths:
        stored = torch.load(path, weights_only=False)  # this test has written the file itself
        problem, batch = families.load_problem(stored["problem"]), TrainBatch(**stored["batch"])
        config = parity.make_config(mesh)
        actor = Actor(config, problem.hf_config, layout, parity.DictReader(problem.weights))
        gradient = parity.gradient_of(actor, parity.shared_step(config, layout, batch, actor)[0])
        expected = stored["expected"]
        if layout.is_controller:
            assert gradient.keys() == expected.keys()
            unused = [name for name in expected if not expected[name].any()]
            assert not any(gradient[name].any() for name in unused)
            used = {name: expected[name] for name in expected if name not in unused}
            found.append(parity.worst({name: gradient[name] for name in used}, used))
    return found
