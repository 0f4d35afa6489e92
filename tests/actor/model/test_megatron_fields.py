"""Which of Megatron's fields a run can set: every field of the installed version is in one table, and refusals say why."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from dapo_mcore.actor.model import megatron_fields
from dapo_mcore.actor.model.megatron_fields import EFFECTIVE, ENGINE_ONLY, OWNED, REFUSED, check_fields
from dapo_mcore.errors import ConfigError

TABLES = {"owned": OWNED, "effective": EFFECTIVE, "Transformer Engine": ENGINE_ONLY, **REFUSED}


def test_every_field_of_the_installed_megatron_is_in_exactly_one_table():
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    fields = {field.name for field in dataclasses.fields(MLATransformerConfig)}
    assert megatron_fields.known_fields() == fields
    places = {name: [reason for reason, names in TABLES.items() if name in names] for name in fields}
    assert {name: found for name, found in places.items() if len(found) != 1} == {}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"hidden_siz": 64}, r"megatron\.hidden_siz is not a field .*did you mean 'hidden_size'"),
        ({"hidden_size": 64}, r"megatron\.hidden_size 64 is decided by the model, parallel and batch sections; set it"),
        (
            {"moe_aux_loss_coeff": 0.01},
            r"megatron\.moe_aux_loss_coeff 0\.01 is refused: its weight would depend on the packing; set model\.moe_aux_loss_coef",
        ),
        ({"recompute_modules": ["mlp"]}, r"model\.recompute decides it, for instance model\.recompute=\[mlp\]"),
        (
            {"fp8_param": True},
            r"fp8_param True is refused: weights stay in model\.dtype: .* FP8 parameters back rounded",
        ),
        ({"fp8": "hybrid"}, r"megatron\.fp8 'hybrid' is refused: the section model\.fp8 decides it"),
        ({"tp_comm_overlap": True}, "is refused: micro-batches have their own lengths, and each would have to fill"),
        ({"deterministic_mode": True}, "is refused: the key `deterministic` decides it"),
        (
            {"layernorm_zero_centered_gamma": True},
            "gamma True would change nothing: only Transformer Engine's layers read it",
        ),
        ({"cross_entropy_loss_fusion": True}, "is refused: the policy head makes loss and logits itself"),
        ({"use_te_rng_tracker": True}, "is refused: only Megatron's own training loop reads it"),
        ({"cuda_graph_impl": "local"}, "CUDA graphs need fixed ones"),
    ],
)
def test_what_would_do_nothing_with_local_layers_is_refused(section, message):
    with pytest.raises(ConfigError, match=message):
        check_fields(section, engine=False)


def test_a_field_that_no_table_knows_is_refused(monkeypatch):
    monkeypatch.setattr(megatron_fields, "known_fields", lambda: {"brand_new"})
    with pytest.raises(ConfigError, match=r"megatron\.brand_new 1 is not known to have an effect in this project"):
        check_fields({"brand_new": 1}, engine=True)


def test_transformer_engine_reads_more():
    check_fields({"symmetric_ar_type": "one_shot", "layernorm_zero_centered_gamma": True}, engine=True)
    with pytest.raises(ConfigError, match="whose shape is set once"):
        check_fields({"tp_comm_overlap": True}, engine=True)


@pytest.mark.parametrize("field", ["fp8", "fp8_recipe", "first_last_layers_bf16"])
def test_fp8_is_asked_for_in_its_own_section_only(field):
    with pytest.raises(
        ConfigError, match=r"the section model\.fp8 decides it, for instance model\.fp8\.recipe=blockwise"
    ):
        check_fields({field: 1}, engine=True)


def test_the_check_imports_neither_torch_nor_megatron():
    script = (
        "import sys; from dapo_mcore.actor.model.megatron_fields import check_fields;"
        "check_fields({'deallocate_pipeline_outputs': True}, engine=False);"
        "assert not {'torch', 'megatron.core'} & set(sys.modules), 'imported'"
    )
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True, timeout=60)
