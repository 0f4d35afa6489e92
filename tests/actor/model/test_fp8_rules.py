"""Which FP8 settings are refused, and what they ask of packs and of Megatron."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dapo_mcore.actor.model import fp8_rules
from dapo_mcore.actor.model.fp8_rules import (
    FP32_SCALES,
    bf16_layers,
    check_fp8,
    check_same_on_all_ranks,
    describe_fp8,
    format_of,
    megatron_fields,
    recipe_of,
    token_multiple,
)
from dapo_mcore.architecture.reader import read_architecture
from dapo_mcore.config.model import Fp8Config, ModelConfig
from dapo_mcore.config.parallel import ParallelConfig
from dapo_mcore.errors import ConfigError
from tests.actor import families
from tests.actor.parity import Mesh, make_config


class Gathered:
    """Rank 0's layout, where `others` arrive from the ranks after it."""

    def __init__(self, *others: tuple[str, str]):
        self.others = others

    def gather_objects(self, value: object) -> list[object]:
        return [value, *self.others]

    def on_controller_or_raise(self, action):
        return action()


def check(family: str = "qwen2", mesh: Mesh | None = None, *, engine: bool = False, dtype: str = "bf16", **fp8) -> None:
    config = make_config(mesh or Mesh(), model__dtype=dtype, model__fp8=fp8 or {"recipe": "blockwise"})
    check_fp8(read_architecture(families.hf_config(family), 64), config.model, config.parallel, engine=engine)


def on_card(monkeypatch, capability: tuple[int, int], engine_version: str = "2.11.0") -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: f"NVIDIA TEST {capability[0]}")
    monkeypatch.setattr(fp8_rules, "version", lambda name: engine_version)


@pytest.mark.parametrize(
    ("fp8", "message"),
    [
        (
            {"recipe": "delayed"},
            "model.fp8: recipe delayed .* first gradients.* underflow; use blockwise or tensorwise",
        ),
        ({"recipe": "mxfp8", "format": "hybrid"}, "mxfp8 with format hybrid is known to diverge; use format e4m3"),
        ({"recipe": "rowwise"}, "model.fp8.recipe is 'rowwise'; set .*blockwise"),
        ({"first_last_bf16": -1}, "model.fp8.first_last_bf16 is -1; set a whole number that is at least 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(fp8, message):
    with pytest.raises(ConfigError, match=message):
        make_config(Mesh(), model__fp8=fp8)


def test_an_override_is_enough_to_turn_it_on():
    from dapo_mcore.config.file import load_config

    path = "examples/quickstart.yaml"
    assert load_config(path, ["model.fp8.recipe=tensorwise"]).model.fp8 == Fp8Config(recipe="tensorwise")


@pytest.mark.parametrize(
    ("recipe", "tensor", "sequence_parallel", "expected"),
    [
        (None, 1, False, 1),
        (None, 3, True, 3),
        ("tensorwise", 1, False, 16),
        ("tensorwise", 3, True, 48),
        ("tensorwise", 2, False, 16),
        ("mxfp8", 2, True, 64),
        ("blockwise", 2, False, 16),
        ("blockwise", 3, True, 384),
    ],
)
def test_a_pack_has_whole_tiles_on_every_rank(recipe, tensor, sequence_parallel, expected):
    model = ModelConfig(path="unused", fp8=Fp8Config(recipe=recipe) if recipe else None)
    parallel = ParallelConfig(tensor_parallel=tensor, sequence_parallel=sequence_parallel)
    assert token_multiple(model, parallel) == expected


def test_widths_must_be_whole_tiles():
    check()
    check(mesh=Mesh(tensor=2), recipe="tensorwise")
    with pytest.raises(
        ConfigError,
        match=r"mxfp8 needs widths divisible by 32, but intermediate_size is 48 per rank \(tensor_parallel 2\); lower parallel",
    ):
        check(mesh=Mesh(tensor=2), recipe="mxfp8")
    with pytest.raises(
        ConfigError, match=r"first_last_bf16 2 keeps 4 layers in bf16, but the model has 3, .* set it to at most 1"
    ):
        check(first_last_bf16=2)


def test_a_model_that_no_layout_helps_is_told_to_go_without():
    fields = {**read_architecture(families.hf_config("qwen2"), 64).fields, "ffn_hidden_size": 200}
    config = make_config(Mesh(tensor=2), model__fp8={"recipe": "tensorwise"})
    architecture = replace(read_architecture(families.hf_config("qwen2"), 64), fields=fields)
    with pytest.raises(ConfigError, match=r"intermediate_size is 100 per rank .*; set model\.fp8 null for this model"):
        check_fp8(architecture, config.model, config.parallel, engine=False)


@pytest.mark.parametrize(
    ("fp8", "dtype", "expected"),
    [
        (
            Fp8Config(),
            "fp32",
            "blockwise (auto; mxfp8 if the training GPUs are Blackwell), format e4m3, simulated on the CPU with fp32 values (a GPU "
            "needs model.dtype bf16)",
        ),
        (Fp8Config(recipe="tensorwise"), "bf16", "tensorwise, format hybrid, simulated on the CPU with bf16 values"),
    ],
)
def test_a_run_on_a_cpu_says_its_recipe_and_that_it_is_simulated(fp8, dtype, expected):
    assert describe_fp8(ModelConfig(path="unused", dtype=dtype, fp8=fp8)) == f"FP8: recipe {expected}"


def test_a_run_on_a_gpu_says_what_auto_became(monkeypatch):
    on_card(monkeypatch, (10, 0))
    found = describe_fp8(ModelConfig(path="unused", dtype="bf16", fp8=Fp8Config()))
    assert found == "FP8: recipe mxfp8 (auto), format e4m3, by Transformer Engine on NVIDIA TEST 10"


def test_a_gpu_needs_bf16(monkeypatch):
    check(dtype="fp32")
    on_card(monkeypatch, (9, 0))
    with pytest.raises(
        ConfigError, match=r"model\.fp8 on a GPU needs model\.dtype bf16, but it is fp32: .*; set model\.dtype bf16"
    ):
        check(engine=True, dtype="fp32")


def test_ranks_that_would_quantize_differently_are_refused_with_their_numbers(monkeypatch):
    on_card(monkeypatch, (10, 0))
    check_same_on_all_ranks(Fp8Config(), Gathered(("mxfp8", "NVIDIA OTHER")))
    message = (
        r"ranks would quantize differently: mxfp8 on ranks 0 to 1 \(NVIDIA TEST 10\); blockwise on rank 2 \(NVIDIA H100\); "
        r"name one model\.fp8\.recipe that all cards have"
    )
    with pytest.raises(ConfigError, match=message):
        check_same_on_all_ranks(Fp8Config(), Gathered(("mxfp8", "NVIDIA TEST 10"), ("blockwise", "NVIDIA H100")))
    monkeypatch.setenv(FP32_SCALES, "1")  # blockwise alone reads it
    check_same_on_all_ranks(Fp8Config(), Gathered(("mxfp8", "NVIDIA TEST 10")))
    with pytest.raises(
        ConfigError, match=rf"blockwise with fp32 scales on rank 0 .*; blockwise on rank 1 .*set {FP32_SCALES} and "
    ):
        check_same_on_all_ranks(Fp8Config(recipe="blockwise"), Gathered(("blockwise", "NVIDIA TEST 10")))
    with pytest.raises(ConfigError, match=r"tensorwise on rank 0 .*; tensorwise with power-of-two scales on rank 1 "):
        other = Gathered(("tensorwise with power-of-two scales", "NVIDIA TEST 10"))
        check_same_on_all_ranks(Fp8Config(recipe="tensorwise"), other)


def test_the_card_and_the_engine_must_know_the_recipe(monkeypatch):
    on_card(monkeypatch, (9, 0))
    check(engine=True)
    with pytest.raises(ConfigError, match="on a GPU needs Transformer Engine's layers, but this run has local ones"):
        check(engine=False)
    with pytest.raises(
        ConfigError,
        match=r"mxfp8 needs a GPU of compute capability 10\.0 or higher, below 12\.0; NVIDIA TEST 9 has 9\.0; set",
    ):
        check(engine=True, recipe="mxfp8")
    on_card(monkeypatch, (12, 0))  # a workstation's Blackwell: Transformer Engine has no mxfp8 there
    with pytest.raises(ConfigError, match=r"NVIDIA TEST 12 has 12\.0; set model\.fp8\.recipe tensorwise or blockwise$"):
        check(engine=True, recipe="mxfp8")
    check(engine=True, recipe="auto")
    on_card(monkeypatch, (9, 0), "2.2.0")
    with pytest.raises(ConfigError, match=r"blockwise needs transformer-engine 2\.3 or newer; 2\.2 is installed"):
        check(engine=True)
    on_card(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(ConfigError, match=r"blockwise needs CUDA 12\.9 or newer; 12\.8 is installed"):
        check(engine=True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    on_card(monkeypatch, (8, 9))
    with pytest.raises(ConfigError, match=r"NVIDIA TEST 8 has 8\.9; set model\.fp8\.recipe tensorwise$"):
        check(engine=True)
    on_card(monkeypatch, (8, 0))
    with pytest.raises(
        ConfigError, match=r"blockwise needs a GPU of compute capability 9\.0 or higher; .* set model\.fp8 null"
    ):
        check(engine=True)


def test_defaults_follow_the_card(monkeypatch):
    assert (recipe_of(Fp8Config()), format_of(Fp8Config())) == ("blockwise", "e4m3")
    assert format_of(Fp8Config(recipe="tensorwise")) == "hybrid"
    on_card(monkeypatch, (10, 0))
    assert (recipe_of(Fp8Config()), format_of(Fp8Config())) == ("mxfp8", "e4m3")


def test_megatron_gets_the_recipe_and_the_layers_that_stay_in_bf16():
    assert megatron_fields(Fp8Config(recipe="blockwise"), 0) == {"fp8": "e4m3", "fp8_recipe": "blockwise"}
    assert megatron_fields(Fp8Config(recipe="tensorwise", first_last_bf16=2), 8) == {
        "fp8": "hybrid",
        "fp8_recipe": "tensorwise",
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": 2,
        "num_layers_at_end_in_bf16": 2,
        "moe_router_padding_for_quantization": True,
    }
    assert bf16_layers(Fp8Config(first_last_bf16=2), 7) == {0, 1, 5, 6}


@pytest.mark.parametrize("recipe", ["blockwise", "tensorwise", "mxfp8"])
@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tensor=4, sequence_parallel=True)], ids=str)
def test_padding_makes_every_expert_s_tokens_divide_into_tiles_in_the_smallest_micro_batch(recipe, mesh):
    """Megatron pads with further tokens of the micro-batch, so there must be enough. An expert without tokens stays without."""
    from megatron.core.transformer.moe.moe_utils import get_align_size_for_quantization, pad_routing_map

    config = make_config(mesh, model__fp8={"recipe": recipe})
    fields = megatron_fields(config.model.fp8, num_experts=6)
    assert fields["moe_router_padding_for_quantization"]
    tile = get_align_size_for_quantization(SimpleNamespace(**fields))
    tokens = token_multiple(config.model, config.parallel) // mesh.tensor
    routes = torch.rand(tokens, 6, generator=torch.Generator().manual_seed(0)) < torch.tensor(
        [0, 0.1, 0.3, 0.5, 0.9, 1]
    )
    padded = pad_routing_map(routes.clone(), tile)
    assert not (padded.sum(0) % tile).any() and not padded[:, 0].any() and padded[:, 1:].any(0).all()
    assert (padded | routes).equal(padded)
