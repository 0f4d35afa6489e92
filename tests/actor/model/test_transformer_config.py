"""What the `megatron` section may set, and how layers are spread over pipeline stages. No processes."""

from __future__ import annotations

import pytest

from dapo_mcore.actor.model.transformer_config import owned_fields, transformer_config
from dapo_mcore.architecture.reader import read_architecture
from dapo_mcore.errors import ConfigError
from tests.actor import families
from tests.actor.parity import Mesh, make_config


def built(family: str = "qwen2", mesh: Mesh | None = None, **overrides):
    return transformer_config(
        make_config(mesh or Mesh(), **overrides), read_architecture(families.hf_config(family), 64)
    )


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
    with pytest.raises(
        ConfigError, match=r"megatron-core refuses the configuration .*shared_experts recompute cannot work"
    ):
        built("qwen2-moe", model__recompute=["shared_experts"], megatron={"moe_shared_expert_overlap": True})


def test_recomputed_modules_are_checked_before_the_model_is_built():
    assert built("mixtral", model__recompute=["core_attn", "moe"]).recompute_modules == ["core_attn", "moe"]
    with pytest.raises(ConfigError, match=r"model\.recompute mlp would save nothing"):
        built("mixtral", model__recompute=["mlp"])


def test_interleaved_stages_have_chunks_of_layers_and_a_call_per_direction():
    interleaved = built("qwen2, seven layers", Mesh(pipeline=2, virtual=2))
    chunks = interleaved.pipeline_model_parallel_layout.layout
    assert [[sum(layer.name == "decoder" for layer in chunk) for chunk in stage] for stage in chunks] == [
        [2, 2],
        [2, 1],
    ]
    assert [layer.name for layer in chunks[1][1]] == ["decoder", "loss"]
    assert interleaved.overlap_p2p_comm and not interleaved.batch_p2p_comm
    plain = built("qwen2, seven layers", Mesh(pipeline=2))
    assert plain.virtual_pipeline_model_parallel_size is None and plain.batch_p2p_comm and not plain.overlap_p2p_comm


def test_the_parts_of_a_layout_must_be_the_chunks_of_the_parallel_section():
    layout = {"pipeline_model_parallel_layout": "Ettt|tt|tt|L"}
    assert built("qwen2, seven layers", Mesh(pipeline=2, virtual=2), megatron=layout)
    with pytest.raises(ConfigError, match=r"has 4 parts, 2 per pipeline stage, but .* is 1; set it to 2"):
        built("qwen2, seven layers", Mesh(pipeline=2), megatron=layout)
    with pytest.raises(ConfigError, match="conflicts with pipeline_model_parallel_layout"):
        built("qwen2, seven layers", Mesh(pipeline=2, virtual=3), megatron=layout)


def test_a_field_that_the_model_decides_is_refused_with_its_value():
    with pytest.raises(ConfigError, match=r"megatron\.hidden_size 64 is decided by .*here 64"):
        built("mixtral", megatron={"hidden_size": 64})


def test_fp8_is_refused_before_the_model_is_built_if_the_widths_do_not_fit():
    assert (
        built(model__fp8={"recipe": "blockwise"}).fp8 is None
    )  # simulated: Megatron's own FP8 needs Transformer Engine
    with pytest.raises(ConfigError, match=r"mxfp8 needs widths divisible by 32, but intermediate_size is 48 per rank"):
        built(mesh=Mesh(tensor=2), model__fp8={"recipe": "mxfp8"})


def test_the_tables_name_what_other_sections_decide():
    from dapo_mcore.actor.model.megatron_fields import EFFECTIVE, OWNED, REFUSED

    decided = set()
    for family in families.FAMILIES:
        decided |= owned_fields(make_config(Mesh()), read_architecture(families.hf_config(family), 64)).keys()
    refused = frozenset().union(*REFUSED.values())  # some of these are decided, with a reason of their own
    assert decided == OWNED | (decided & refused)
    assert not OWNED & EFFECTIVE
