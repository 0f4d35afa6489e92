"""Which implementation each part of a layer gets without Transformer Engine, and where a checkpoint stores its norms."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from dapo_mcore.actor.model.attention import CoreAttention
from dapo_mcore.actor.model.latent import ReplicatedLinear
from dapo_mcore.actor.model.layers import RMSNorm, layer_specs, uses_transformer_engine
from dapo_mcore.actor.model.transformer_config import transformer_config
from dapo_mcore.architecture.reader import read_architecture
from dapo_mcore.errors import ConfigError
from tests.actor import families
from tests.actor.parity import Mesh, make_config

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the layers of a CPU")


@pytest.fixture
def specs():
    """Return a function that returns the layers of a pipeline stage. There are no processes: Megatron is told its stage."""

    def build(family: str, stage: int = 0, stages: int = 1):
        parallel_state.set_pipeline_model_parallel_rank(stage)
        config = make_config(Mesh(pipeline=stages), model__transformer_impl="local")
        return layer_specs(transformer_config(config, read_architecture(families.hf_config(family), 64)))

    yield build
    parallel_state.set_pipeline_model_parallel_rank(None)


def test_transformer_engine_is_refused_where_it_cannot_run():
    config = make_config(Mesh(), model__transformer_impl="transformer_engine")
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        uses_transformer_engine(config.model)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_norm_divides_by_the_root_mean_square_of_the_last_dim(sequence_parallel):
    config = SimpleNamespace(
        use_cpu_initialization=True, params_dtype=torch.float32, sequence_parallel=sequence_parallel
    )
    norm = RMSNorm(config, hidden_size=2, eps=0.5)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 10.0]))
    # mean square (1 + 6) / 2 = 3.5, with eps 4, root 2
    hidden = torch.tensor([[1.0, 6.0**0.5]])
    torch.testing.assert_close(norm(hidden), torch.tensor([[1.0, 5 * 6.0**0.5]]))
    assert norm.weight.sequence_parallel is sequence_parallel, "finalize_model_grads sums the gradients of such weights"


def test_norms_before_attention_and_dense_mlps_are_stored_as_transformer_engine_stores_them(specs):
    block = specs("qwen3")
    assert block.layer_norm is RMSNorm and len(block.layer_specs) == 3
    for layer in block.layer_specs:
        parts = layer.submodules
        assert parts.input_layernorm is parts.pre_mlp_layernorm is RMSNorm
        attention = parts.self_attention.submodules
        assert attention.core_attention is CoreAttention
        assert attention.q_layernorm is attention.k_layernorm is RMSNorm
        assert parts.sharded_state_dict_keys_map == {
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        }


def test_a_norm_before_experts_keeps_its_own_name_on_every_stage(specs):
    """Of the three layers of this model the middle one is dense. The first of two stages holds two layers."""

    def stored(*stage: int) -> list[set[str]]:
        return [set(layer.submodules.sharded_state_dict_keys_map) for layer in specs("qwen2-moe", *stage).layer_specs]

    experts, dense = {"input_layernorm."}, {"input_layernorm.", "pre_mlp_layernorm."}
    assert stored() == [experts, dense, experts]
    assert stored(0, 2) == [experts, dense] and stored(1, 2) == [experts]


def test_latent_attention_gets_replicated_down_projections_and_norms_of_its_vectors(specs):
    for layer in specs("deepseek-v3").layer_specs:
        attention = layer.submodules.self_attention
        assert issubclass(attention.module, MLASelfAttention)
        parts = attention.submodules
        assert parts.linear_q_down_proj is parts.linear_kv_down_proj is ReplicatedLinear
        assert parts.q_layernorm is parts.kv_layernorm is RMSNorm
        names = layer.submodules.sharded_state_dict_keys_map
        assert names["self_attention.kv_layernorm."] == "self_attention.linear_kv_up_proj.layer_norm_"
        assert names["self_attention.q_layernorm."] == "self_attention.linear_q_up_proj.layer_norm_"
