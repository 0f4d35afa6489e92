"""Fields of Megatron's TransformerConfig that verl overrides, in our words."""

from __future__ import annotations

from typing import Any

import pytest

from dapo_mcore.actor.model.megatron_fields import check_fields, known_fields
from dapo_mcore.foreign.tables.verl_megatron import HANDED_ON
from tests.foreign.verl_runs import A, imported, lost, ours

PLACE = f"{A}.megatron.override_transformer_config"


def found(**fields: Any) -> dict[str, Any]:
    """Return our keys that fields set; verl's defaults set none of them."""
    keys = ("megatron", "model.recompute", "model.fp8", "model.moe_aux_loss_coef", "deterministic")
    run = ours({f"{A}.strategy": "megatron", **{f"{PLACE}.{name}": value for name, value in fields.items()}})
    return {key: run[key] for key in keys if key in run}


def test_the_section_megatron_takes_what_is_handed_on() -> None:
    """Fields of the installed megatron-core: an older one lacks some."""
    check_fields(dict.fromkeys(HANDED_ON & known_fields(), 1), engine=True)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_layers_in_first_pipeline_stage": 7}, {"megatron": {"num_layers_in_first_pipeline_stage": 7}}),
        ({"moe_router_dtype": "fp32", "moe_permute_fusion": True}, {"megatron": {"moe_router_dtype": "fp32", "moe_permute_fusion": True}}),
        ({"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}, {"model.recompute": "full"}),
        ({"recompute_granularity": "selective"}, {"model.recompute": "selective"}),
        ({"recompute_granularity": "selective", "recompute_modules": ["moe", "moe_act", "mlp"]}, {"model.recompute": ["moe", "mlp"]}),
        ({"fp8": "hybrid", "fp8_recipe": "blockwise"}, {"model.fp8": {"recipe": "blockwise", "format": "hybrid"}}),
        (
            {"fp8": "e4m3", "fp8_recipe": "tensorwise", "first_last_layers_bf16": True, "num_layers_at_end_in_bf16": 2},
            {"model.fp8": {"recipe": "tensorwise", "format": "e4m3", "first_last_bf16": 2}},
        ),
        ({"moe_aux_loss_coeff": 0.01, "moe_router_load_balancing_type": "aux_loss"}, {"model.moe_aux_loss_coef": 0.01}),
        ({"deterministic_mode": True}, {"deterministic": True}),
        ({"attention_dropout": 0.0, "apply_rope_fusion": True, "use_flash_attn": True, "attention_backend": "flash"}, {}),
    ],
)  # fmt: skip
def test_fields_that_have_a_place_here(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found(**fields) == expected
    assert found() == {}


@pytest.mark.parametrize(
    ("name", "value", "objective"),
    [("hidden_dropout", 0.1, True), ("moe_z_loss_coeff", 0.001, True), ("num_layers", 12, True), ("mtp_num_layers", 1, True),
     ("fp8", "hybrid", True), ("new_field", 1, True), ("sequence_parallel", False, False)],
)  # fmt: skip
def test_fields_that_have_none_are_lost(name: str, value: Any, objective: bool) -> None:
    """fp8 without a recipe is delayed scaling, which is refused here."""
    assert lost({f"{A}.strategy": "megatron", f"{PLACE}.{name}": value}) == {f"{PLACE}.{name}": objective}


def test_the_whole_mapping_at_once() -> None:
    settings = {f"{A}.strategy": "megatron", PLACE: {"moe_permute_fusion": True, "hidden_dropout": 0.0}}
    assert ours(settings)["megatron"] == {"moe_permute_fusion": True}
    assert imported({**settings, PLACE: {}}).kind_of(PLACE) == "meaningless"
