"""Gradient steps with simulated FP8, in real processes: how far gradients are from those without it, and what stays exact."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from dapo_mcore.actor.learner import Learner
from dapo_mcore.actor.model import fp8_rules
from dapo_mcore.actor.model.fp8_layers import Quantizer
from dapo_mcore.actor.model.fp8_numbers import Quantized
from dapo_mcore.actor.model.latent import ReplicatedLinear
from dapo_mcore.actor.model.policy import build_policy
from dapo_mcore.actor.scatter import scatter_step
from dapo_mcore.architecture.manifest import WeightManifest
from dapo_mcore.architecture.mapping import find_parameter
from dapo_mcore.architecture.reader import read_architecture
from dapo_mcore.architecture.shape import weight_shape
from dapo_mcore.config.model import Fp8Config
from dapo_mcore.config.parallel import ParallelConfig
from dapo_mcore.errors import ConfigError, DapoError
from dapo_mcore.rollout.sglang.sync.weight_format import quantized
from tests.actor import families, parity
from tests.actor.parity import Mesh

RECIPES: dict[str, dict[str, Any]] = {
    "tensorwise": {"recipe": "tensorwise"},
    "blockwise": {"recipe": "blockwise"},
    "blockwise hybrid": {"recipe": "blockwise", "format": "hybrid"},
    "mxfp8": {"recipe": "mxfp8"},
    "bf16 ends": {"recipe": "blockwise", "first_last_bf16": 1},
}
LOUD = 7
LINEAR = (ColumnParallelLinear, RowParallelLinear, ReplicatedLinear)
MESHES = [Mesh(), Mesh(pipeline=2), Mesh(tensor=2, context=2, sequence_parallel=True)]


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parity.save_problem(tmp_path_factory.mktemp("fp8") / "problem.pt", parity.off_policy(parity.make_batch()))


@pytest.fixture(scope="module")
def found(problem: Path) -> dict[str, dict[str, Any]]:
    return {str(mesh): parity.spawn(train, mesh, str(problem)) for mesh in MESHES}


def test_gradients_are_near_those_without_fp8_and_the_first_ratio_is_exactly_1(found):
    for mesh, recipes in found.items():
        for name, row in recipes.items():
            print(f"{mesh} {name}: gradient off by {row['deviation']:.4f}, {row['lost']:.6f} of dY become 0")
            assert row["lost"] < 0.03, (mesh, name)
            assert 0.01 < row["deviation"] < 0.04, (mesh, name)
            assert row["first_ratio_deviation"] == 0.0, (mesh, name)
    alone = found[str(Mesh())]
    assert alone["bf16 ends"]["deviation"] < alone["blockwise"]["deviation"]


def test_stages_of_a_pipeline_compute_what_one_process_does(found):
    for name, row in found[str(Mesh(pipeline=2))].items():
        assert row["deviation"] == pytest.approx(found[str(Mesh())][name]["deviation"], rel=1e-3), name


def test_every_rank_has_whole_tiles_of_tokens(found):
    for mesh in MESHES:
        for name, row in found[str(mesh)].items():
            assert row["tokens_per_rank"] and all(count % row["multiple"] == 0 for count in row["tokens_per_rank"]), (
                mesh,
                name,
            )
    assert found[str(MESHES[2])]["blockwise"]["multiple"] == 256


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_gradients_do_not_depend_on_the_padding_token_nor_on_the_number_of_pads(alone, recipe, monkeypatch):
    """Pads are a beginning of the longest sample. More of them change a gradient's last bits only."""
    few, loud = (padded_gradient(alone, recipe, 32, pad, monkeypatch) for pad in (0, LOUD))
    assert all(torch.equal(few[name], loud[name]) for name in few)
    many = padded_gradient(alone, recipe, 56, 0, monkeypatch)
    assert deviation(many, few) < 1e-6


@pytest.mark.parametrize("family", list(families.FAMILIES))
def test_every_linear_layer_of_every_family_is_checked_and_simulated(alone, family):
    hf_config = families.hf_config(family)
    config = parity.make_config(Mesh(), model__fp8={"recipe": "blockwise", "first_last_bf16": 1})
    widths = set(fp8_rules._widths(read_architecture(hf_config, 64).fields, ParallelConfig()).values())
    if any(width % 16 for width in widths):
        with pytest.raises(ConfigError, match="needs widths divisible by 16"):
            build_policy(config, hf_config, alone)
        return
    (model,) = build_policy(config, hf_config, alone)
    layers = model.decoder.layers
    linear = [[m for m in layer.modules() if isinstance(m, LINEAR)] for layer in layers]
    simulated = [[bool({"_forward_impl", "product"} & vars(module).keys()) for module in some] for some in linear]
    assert [set(some) for some in simulated] == [{False}, *[{True}] * (len(layers) - 2), {False}]
    sizes = {size for some in linear for module in some for size in module.weight.shape}
    assert sizes <= widths | {2 * width for width in widths}  # gate and up projection are one matrix


def train(layout: Any, mesh: Mesh, path: str) -> dict[str, dict[str, Any]]:
    """Return what one gradient step with each recipe gives. Runs in a worker."""
    from dapo_mcore.actor.metrics import update_metrics

    batch, _ = parity.load_problem(path)
    refuse_other_scales(layout)
    rows, plain = {}, {}
    for name, fp8 in [("none", None), *RECIPES.items()]:
        if fp8 and fp8["recipe"] == "mxfp8" and mesh.tensor > 1:
            continue  # 96 / 2 columns of the MLP are no whole tiles of 32
        config = parity.make_config(mesh, model__fp8=fp8, algo__old_logprobs="actor", batch__max_tokens=600)
        actor = parity.build_actor(config, layout)
        scored = parity.scored_step(config, layout, batch, actor)
        gradient = parity.capture_first_gradient(actor)
        with counting_lost_gradients() as lost:
            metrics = update_metrics([actor.update(actor.score(scored.mini_batches[0]))])
        if fp8 is None:
            plain = gradient
            continue
        rows[name] = {
            "deviation": deviation(gradient, plain) if layout.is_controller else 0.0,
            "first_ratio_deviation": metrics["actor/first_update_ratio_deviation"],
            "lost": lost["lost"] / lost["all"],
            "tokens_per_rank": [micro.tokens.numel() for micro in scored.mini_batches[0]],
            "multiple": fp8_rules.token_multiple(config.model, config.parallel),
        }
    return rows


@pytest.mark.parametrize("family", ["qwen2", "qwen3-moe", "mixtral"])
def test_trainer_and_rollout_quantize_the_same_weights(alone, family):
    hf_config = families.hf_config(family)
    policy = build_policy(parity.make_config(Mesh(), model__fp8={"recipe": "blockwise"}), hf_config, alone)
    simulated = {id(m.weight) for m in policy.modules() if {"_forward_impl", "product"} & vars(m).keys()}
    shape = weight_shape(hf_config, 1)
    ours = {
        hf
        for name, weight in policy.named_weights()
        if id(weight) in simulated
        for hf in find_parameter(name, shape).hf
    }
    stream = ((name, torch.ones(size)) for name, size in WeightManifest.of_config(hf_config).shapes.items())
    theirs = {name.removesuffix("_scale_inv") for name, _ in quantized(stream) if name.endswith("_scale_inv")}
    assert ours == theirs and len(ours) >= 7 * hf_config.num_hidden_layers


def padded_gradient(
    layout: Any, recipe: str, multiple: int, pad_token: int, monkeypatch: pytest.MonkeyPatch
) -> dict[str, torch.Tensor]:
    """Return the gradient of one pack of `multiple` tokens or more, where the token LOUD has an embedding unlike all others."""
    monkeypatch.setattr(fp8_rules, "_tokens_per_rank", lambda *_: multiple)
    config = parity.make_config(Mesh(), model__fp8={"recipe": recipe}, batch__max_tokens=512)
    actor = parity.build_actor(config, layout)
    with torch.no_grad():
        actor.policy[0].embedding.word_embeddings.weight[LOUD, 3] = 1e6
    batch = parity.off_policy(parity.make_batch())
    batch.tokens[batch.tokens == LOUD] = 0
    share = scatter_step(batch, config, layout, mini_batch_prompts=4, seed=None)
    (mini_batch,) = Learner(actor, pad_token).score(share).mini_batches
    num_pads = sum(micro.tokens.numel() for micro in mini_batch) - batch.lengths.sum()
    assert len(mini_batch) == 1 and 0 < num_pads <= batch.lengths.max()
    actor.backward(mini_batch)
    return {name: parameter.main_grad.clone() for name, parameter in actor.policy.named_parameters()}


@contextmanager
def counting_lost_gradients() -> Iterator[Counter[str]]:
    """Count the elements of output gradients that are not 0, and those of them that are 0 in FP8."""
    counts, plain = Counter[str](), Quantizer.output_gradient

    def counted(self: Quantizer, matrix: torch.Tensor, along: int) -> Quantized:
        found = plain(self, matrix, along)
        counts["all"] += int((matrix != 0).sum())
        counts["lost"] += int(((matrix != 0) & (found.values() == 0)).sum())
        return found

    Quantizer.output_gradient = counted
    yield counts
    Quantizer.output_gradient = plain


def refuse_other_scales(layout: Any) -> None:
    """Check that every rank ends if the last rank has fp32 scales and the others have not."""
    if layout.world_size == 1:
        return
    os.environ[fp8_rules.FP32_SCALES] = str(int(layout.rank == layout.world_size - 1))
    with pytest.raises(DapoError, match=f"blockwise with fp32 scales on rank {layout.world_size - 1}"):
        fp8_rules.check_same_on_all_ranks(Fp8Config(), layout)
    del os.environ[fp8_rules.FP32_SCALES]
    fp8_rules.check_same_on_all_ranks(Fp8Config(), layout)


def deviation(gradient: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return ‖g − g₀‖ / ‖g₀‖ over all tensors together."""
    difference = torch.cat([(gradient[name].double() - expected[name].double()).flatten() for name in expected])
    return float(difference.norm() / torch.cat([g.flatten() for g in expected.values()]).norm())
