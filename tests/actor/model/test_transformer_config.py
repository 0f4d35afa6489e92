"""What a mesh must fulfil for a model, what the `megatron` section may set, and how layers are spread. No processes."""

from __future__ import annotations

import pytest

from dapo_mcore.actor.model.layers import uses_transformer_engine
from dapo_mcore.actor.model.transformer_config import check_mesh, split_layers, transformer_config
from dapo_mcore.architecture.reader import read_architecture
from dapo_mcore.errors import ConfigError
from tests.actor import families
from tests.actor.parity import Mesh, make_config


def check(mesh: Mesh, family: str = "qwen2", **changes):
    check_mesh(read_architecture(families.hf_config(family, **changes), 64), make_config(mesh).parallel)


def built(family: str = "qwen2", mesh: Mesh | None = None, **overrides):
    return transformer_config(
        make_config(mesh or Mesh(), **overrides), read_architecture(families.hf_config(family), 64)
    )


SIX_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96}


@pytest.mark.parametrize(
    ("mesh", "family", "changes", "message"),
    [
        (Mesh(tensor=3), "qwen2", {}, "tensor_parallel 3 does not divide num_attention_heads 4; use 1, 2 or 4"),
        (Mesh(tensor=2), "qwen2", SIX_HEADS, "tensor_parallel 2 is neither .* num_key_value_heads 3; use 1, 3 or 6"),
        (
            Mesh(tensor=2),
            "qwen2",
            {"intermediate_size": 97},
            "tensor_parallel 2 does not divide intermediate_size 97; use 1",
        ),
        (
            Mesh(pipeline=4),
            "qwen2",
            {},
            "pipeline_parallel 4 leaves stages empty: num_hidden_layers is 3; use at most 3",
        ),
        (Mesh(expert=2), "qwen2", {}, "Qwen2ForCausalLM has no experts, so parallel.expert_parallel must be 1 .here 2"),
        (Mesh(expert_tensor=2), "qwen2", {}, "expert_tensor_parallel unset .here 2"),
        (Mesh(expert=3), "mixtral", {}, "expert_parallel 3 does not divide the number of experts 4; use 1, 2 or 4"),
        (
            Mesh(expert_tensor=5),
            "qwen3-moe",
            {},
            "expert_tensor_parallel 5 does not divide the experts' intermediate size 48; use 1, 2",
        ),
        (Mesh(tensor=2), "mixtral", {}, "tensor_parallel 2 with experts needs sequence_parallel"),
        (
            Mesh(tensor=2, sequence_parallel=True),
            "qwen2-moe",
            {"shared_expert_intermediate_size": 41},
            "does not divide shared_expert_intermediate_size 41",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_the_numbers(mesh, family, changes, message):
    with pytest.raises(ConfigError, match=message):
        check(mesh, family, **changes)


@pytest.mark.parametrize(
    ("mesh", "family", "changes"),
    [
        (Mesh(tensor=4), "qwen2", {}),  # two key-value heads
        (Mesh(tensor=2), "qwen2", {"num_key_value_heads": 1}),
        (Mesh(pipeline=2), "qwen2", {"num_hidden_layers": 5}),
        # no dense layer: the width of the MLPs that are not there does not matter
        (Mesh(tensor=2, sequence_parallel=True), "qwen3-moe", {"intermediate_size": 97}),
        (Mesh(tensor=2, sequence_parallel=True, expert=4), "mixtral", {"intermediate_size": 97}),
    ],
)
def test_a_mesh_that_fits_passes(mesh, family, changes):
    check(mesh, family, **changes)


@pytest.mark.parametrize(
    ("layers", "stages", "expected"),
    [
        (4, 2, [2, 2]),
        (5, 2, [3, 2]),
        (7, 4, [2, 2, 2, 1]),
        (6, 4, [1, 2, 2, 1]),
        (5, 4, [1, 1, 2, 1]),
        (61, 8, [7, 7, 8, 8, 8, 8, 8, 7]),
        (3, 3, [1, 1, 1]),
    ],
)
def test_layers_that_do_not_divide_are_spread_with_light_ends(layers, stages, expected):
    assert split_layers(layers, stages) == expected


def test_expert_tensor_parallel_follows_tensor_parallel_until_experts_are_distributed():
    assert built("mixtral", Mesh(tensor=2, sequence_parallel=True)).expert_tensor_parallel_size == 2
    assert built("mixtral", Mesh(tensor=2, sequence_parallel=True, expert=2)).expert_tensor_parallel_size == 1
    chosen = Mesh(tensor=2, sequence_parallel=True, expert=2, expert_tensor=2)
    assert built("mixtral", chosen).expert_tensor_parallel_size == 2


def test_megatron_section_passes_upstream_fields_through():
    assert built(megatron={"deallocate_pipeline_outputs": True}).deallocate_pipeline_outputs is True
    assert built("mixtral").moe_router_dtype == "fp32"
    assert built("mixtral", megatron={"moe_router_dtype": "fp64"}).moe_router_dtype == "fp64"


def test_megatron_section_may_choose_the_stages_itself():
    two_stages = Mesh(pipeline=2)
    assert built(mesh=two_stages).pipeline_model_parallel_layout.layout[0][0][0].name == "embedding"
    chosen = built(mesh=two_stages, megatron={"num_layers_in_first_pipeline_stage": 1})
    assert chosen.pipeline_model_parallel_layout is None
    with pytest.raises(ConfigError, match=r"spreads 3 layers over pipeline stages as \[9, -6\]"):
        built(mesh=two_stages, megatron={"num_layers_in_first_pipeline_stage": 9})


def test_what_upstream_refuses_is_a_config_error():
    with pytest.raises(ConfigError, match=r"megatron-core refuses the configuration .*allgather"):
        built("mixtral", megatron={"moe_token_dispatcher_type": "allgather"})


def test_interleaved_pipelines_are_refused():
    layout = [["embedding", "decoder"], ["decoder"], ["decoder"], ["loss"]]
    with pytest.raises(ConfigError, match="2 virtual pipeline stages per rank"):
        built(mesh=Mesh(pipeline=2), megatron={"pipeline_model_parallel_layout": layout})


def test_a_field_that_the_model_decides_is_refused_with_its_value():
    with pytest.raises(ConfigError, match=r"megatron\.hidden_size 64 is decided by .*here 64"):
        built("mixtral", megatron={"hidden_size": 64})


def test_fp8_without_transformer_engine_is_refused_before_the_model_is_built():
    with pytest.raises(ConfigError, match=r"megatron\.fp8 'e4m3' would change nothing"):
        built(megatron={"fp8": "e4m3"})


def test_the_tables_name_what_other_sections_decide():
    from dapo_mcore.actor.model import transformer_config as megatron_config
    from dapo_mcore.actor.model.megatron_fields import EFFECTIVE, OWNED, REFUSED

    decided = {"moe_router_load_balancing_type"}
    for family in families.FAMILIES:
        config, architecture = make_config(Mesh()), read_architecture(families.hf_config(family), 64)
        decided |= architecture.fields.keys() | megatron_config._mesh(config.parallel).keys()
        decided |= megatron_config._implementation(config, architecture).keys()
        decided |= megatron_config._precision(config.model.dtype).keys()
    assert decided == OWNED | (decided & REFUSED[next(r for r in REFUSED if "auxiliary" in r)])
    assert not OWNED & EFFECTIVE


def test_transformer_engine_is_refused_where_it_cannot_run():
    config = make_config(Mesh(), model__transformer_impl="transformer_engine")
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        uses_transformer_engine(config.model)
