"""Every layout against Hugging Face, torch AdamW and the plain fp64 loss, on multi-turn samples; and each check against broken
scaling.

Proves: gradients, gradient norm and parameters of real megatron-core under TP, PP (interleaved, too), CP, DP and SP on gloo, in
fp32.
Does not prove: NCCL, Transformer Engine, bf16, overlapped communication.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.actor import parity
from tests.actor.parity import Mesh

GRADIENT_TOLERANCE = 1e-6  # per tensor, ‖Δ‖₂ / ‖g‖₂
PARAMETER_TOLERANCE = 2e-5  # largest |Δ| after three steps at lr 1e-3

MESHES = [
    Mesh(),
    Mesh(tensor=2),
    Mesh(tensor=2, sequence_parallel=True),
    Mesh(pipeline=2),
    Mesh(pipeline=2, virtual=2),
    Mesh(context=4),
    Mesh(data=2),
    Mesh(tensor=2, context=2, sequence_parallel=True),
    Mesh(tensor=2, pipeline=2),
    Mesh(pipeline=2, context=2),
    Mesh(tensor=2, pipeline=2, context=2, sequence_parallel=True),
]
THOROUGH = [MESHES[0], MESHES[6], MESHES[-1]]
"""One process, data-parallel ranks, and all kinds of ranks."""


@pytest.fixture(scope="module")
def problem(tmp_path_factory) -> str:
    return str(parity.save_problem(tmp_path_factory.mktemp("parity") / "qwen2.pt", parity.multi_turn_batch()))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_three_steps_equal_the_fp64_reference_and_broken_scaling_does_not(mesh, problem):
    for row in parity.spawn(compare_all, mesh, problem):
        setting = row.pop("setting")
        broken = row.pop("broken")
        assert row["gradient"] <= GRADIENT_TOLERANCE, (setting, row)
        assert row["norm"] <= GRADIENT_TOLERANCE, (setting, row)
        assert row["parameters"] <= PARAMETER_TOLERANCE, (setting, row)
        for name, error in broken.items():
            assert error > 100 * GRADIENT_TOLERANCE, f"{setting}: breaking {name} went unnoticed ({error:.1e})"


@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("qwen3", False), ("llama", False)])
def test_families_and_tied_embeddings_over_tensor_and_pipeline_stages(family, tied, tmp_path):
    batch = parity.off_policy(parity.make_batch(), parity.model64(family, tied))
    path = parity.save_problem(tmp_path / "problem.pt", batch, family, tied)
    row = parity.spawn(compare_one, Mesh(tensor=2, pipeline=2), str(path))
    assert row["gradient"] <= GRADIENT_TOLERANCE, row
    assert row["parameters"] <= PARAMETER_TOLERANCE, row


UNEVEN = {"pipeline_model_parallel_layout": "Et|t|t|t|tt|L"}  # the last chunk is the head alone
INTERLEAVED = [
    {"batch__max_tokens": 400, "batch__packing": False},
    {"model__recompute": "full", "megatron": UNEVEN},
    {"batch__max_tokens": 48, "model__recompute": ["core_attn", "mlp"]},
]


def test_three_interleaved_stages_with_uneven_chunks_and_empty_micro_batches(tmp_path):
    batch = parity.off_policy(parity.make_batch(), parity.model64("qwen2, 6", True))
    path = parity.save_problem(tmp_path / "problem.pt", batch, "qwen2, 6", True)
    rows = parity.spawn(compare_interleaved, Mesh(pipeline=3, virtual=2), str(path))
    for row in rows:
        assert row["gradient"] <= GRADIENT_TOLERANCE, row
        assert row["norm"] <= GRADIENT_TOLERANCE, row
        assert row["parameters"] <= PARAMETER_TOLERANCE, row
    assert [row["micro-batches"] for row in rows] == [3, 6, 9]
    assert rows[0]["empty"] > 0


def compare_all(layout: Any, mesh: Mesh, path: str) -> list[dict[str, Any]]:
    """Compare with and without the distributed optimizer, packed and unpacked, and each deliberately broken. Runs in a worker.

    Meshes with data-parallel or all kinds of ranks meet all four combinations, the others both values of each. Eager mode of
    the head is on in half of them, so it meets each of these settings.
    """
    pairs = [(False, True), (True, False)] if mesh not in THOROUGH else list(itertools.product((False, True), repeat=2))
    rows = []
    for number, (distributed, packing) in enumerate(pairs):
        settings = dict(optimizer__distributed=distributed, batch__packing=packing)
        eager = distributed == packing if mesh in THOROUGH else number == MESHES.index(mesh) % 2
        row = compare(layout, mesh, path, batch__head_eager_grad=eager, **settings)
        rows.append(row | {"setting": f"{mesh} distributed={distributed} packing={packing}"})
    return rows


def compare_interleaved(layout: Any, mesh: Mesh, path: str) -> list[dict[str, Any]]:
    """Worker."""
    return [compare(layout, mesh, path, **settings) for settings in INTERLEAVED]


def compare_one(layout: Any, mesh: Mesh, path: str) -> dict[str, Any]:
    """Compare packed micro-batches with the distributed optimizer. Runs in a worker."""
    return compare(layout, mesh, path)


def compare(layout: Any, mesh: Mesh, path: str, **overrides: Any) -> dict[str, Any]:
    batch, expected = parity.load_problem(path)
    config = parity.make_config(mesh, **overrides)
    actor = parity.build_actor(config, layout, expected["family"], expected["tied"])
    (mini_batch,) = parity.shared_step(config, layout, batch, actor)
    broken = {name: parity.gradient_of(actor, mini) for name, mini in broken_scalings(layout, mini_batch).items()}
    broken |= {name: skipped(actor, mini_batch) for name, skipped in skipped_reductions(mesh).items()}
    gradient = parity.capture_first_gradient(actor)
    norms = [actor.update(mini_batch).grad_norm for _ in range(parity.STEPS)]
    parameters = parity.gather_named(actor, dict(actor.policy.named_weights()))
    if not layout.is_controller:
        return {}
    return {
        "micro-batches": len(mini_batch),
        "empty": sum(not len(micro.rows) for micro in mini_batch),
        "gradient": parity.worst(gradient, expected["grads"]),
        "norm": max(abs(a / b - 1) for a, b in zip(norms, expected["norms"])),
        "parameters": max(float((parameters[k].double() - v).abs().max()) for k, v in expected["params"].items()),
        "broken": {name: parity.worst(found, expected["grads"]) for name, found in broken.items()},
    }


def broken_scalings(layout: Any, mini_batch: Any) -> dict[str, Any]:
    """Return the mini-batch with one scaling factor wrong at a time, as public trainers have had it."""

    def scaled(factor: float) -> Any:
        return [micro.with_(token_weights=micro.token_weights * factor) for micro in mini_batch]

    last = layout.data_rank == layout.data - 1 and layout.context_rank == layout.context - 1
    broken = {"token count": scaled(1 - 1 / 136), "mean over micro-batches": scaled(1 / len(mini_batch))}
    if layout.data * layout.context > 1:
        broken["mean over data and context ranks"] = scaled(1 / (layout.data * layout.context))
        broken["one rank's share"] = scaled(1.001 if last else 1.0)
    return broken


def skipped_reductions(mesh: Mesh) -> dict[str, Any]:
    """Return functions that compute the gradient without one of the tensor-parallel reductions."""
    skipped = {}
    if mesh.tensor > 1:
        skipped["sum of the head's hidden gradient"] = without_head_reduction
    if mesh.sequence_parallel:
        skipped["sum of norm gradients"] = without_norm_reduction
    return skipped


def without_norm_reduction(actor: Any, mini_batch: Any) -> Any:
    marked = [p for p in actor.policy.parameters() if getattr(p, "sequence_parallel", False)]
    for parameter in marked:
        parameter.sequence_parallel = False
    gradient = parity.gradient_of(actor, mini_batch)
    for parameter in marked:
        parameter.sequence_parallel = True
    return gradient


def without_head_reduction(actor: Any, mini_batch: Any) -> Any:
    actor.head.reduce_hidden_grad = False
    gradient = parity.gradient_of(actor, mini_batch)
    actor.head.reduce_hidden_grad = True
    return gradient
