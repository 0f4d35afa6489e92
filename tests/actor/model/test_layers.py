"""Which implementation each part of a layer gets without Transformer Engine, and where a checkpoint stores its norms."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from dapo_mcore.actor.model import policy
from dapo_mcore.actor.model.attention import CoreAttention
from dapo_mcore.actor.model.latent import ReplicatedLinear
from dapo_mcore.actor.model.layers import RMSNorm, layer_specs, uses_transformer_engine
from dapo_mcore.actor.model.transformer_config import transformer_config
from dapo_mcore.architecture.reader import read_architecture
from dapo_mcore.errors import ConfigError
from tests.actor import families, parity
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


class EngineProduct(torch.autograd.Function):
    """A linear layer's product with Transformer Engine's contract for weight gradients (2.11, pytorch/module/linear.py)."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, layer: Any) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.layer, ctx.overwrites = layer, layer.is_first_microbatch
        layer.is_first_microbatch = False
        return hidden @ weight.T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        hidden, weight = ctx.saved_tensors
        own = gradient.flatten(0, 1).T @ hidden.flatten(0, 1)
        if ctx.layer.fuse_wgrad_accumulation:
            ctx.layer.num_overwritten += ctx.overwrites
            own = weight.main_grad.copy_(own) if ctx.overwrites else weight.main_grad.add_(own)
            weight.grad_added_to_main_grad = True
            own = torch.full_like(weight, torch.nan)  # what a dummy holds
        return gradient @ weight, own, None


def as_engine_layers(model: torch.nn.Module) -> list[Any]:
    """Let the model's local linear layers behave as Transformer Engine's, and return them."""
    layers = [m for m in model.modules() if isinstance(m, (ColumnParallelLinear, RowParallelLinear))]
    for layer in layers:
        layer.fuse_wgrad_accumulation, layer.is_first_microbatch, layer.num_overwritten = False, True, 0

        def product(input: torch.Tensor, weight: torch.Tensor, bias: Any, layer: Any = layer, **_: Any) -> torch.Tensor:
            out = EngineProduct.apply(input, weight, layer)
            return out if bias is None else out + bias

        layer._forward_impl = product
    return layers


@pytest.mark.parametrize("tied", [False, True])
def test_transformer_engine_adds_weight_gradients_to_main_grad_itself(alone, monkeypatch, tied):
    """Equal bits with and without, over two gradient steps with scoring between them, as if FP8 were on: then a schedule call's
    first micro-batch overwrites. A gradient that DDP added again would be NaN."""

    def set_is_first_microbatch(model: Any) -> None:
        for module in (m for m in model.modules() if hasattr(m, "is_first_microbatch")):
            module.is_first_microbatch = True

    monkeypatch.setattr(MegatronModule, "set_is_first_microbatch", set_is_first_microbatch)
    accumulate = policy.accumulate_in_products

    def gradients(fused: bool, **options: Any) -> list[torch.Tensor]:
        layers: list[Any] = []

        def built(model: torch.nn.Module) -> None:
            layers.extend(as_engine_layers(model.decoder))
            if fused:
                accumulate(model)

        monkeypatch.setattr(policy, "accumulate_in_products", built)
        config = parity.make_config(Mesh(), algo__old_logprobs="actor", **options)
        actor = parity.build_actor(config, alone, tied=tied)
        (mini_batch,) = parity.shared_step(config, alone, parity.make_batch(), actor)
        assert len(mini_batch) > 1
        found = []
        for _ in range(2):
            actor.update(actor.score(mini_batch))
            found += [parameter.main_grad.clone() for _, parameter in actor.policy.named_weights()]
        assert [layer.num_overwritten for layer in layers] == [2 * fused] * len(layers) and layers
        return found

    plain = gradients(fused=False)
    overlap = {"parallel__overlap_grad_reduce": True, "parallel__bucket_size": 3000}
    for found in (gradients(fused=True), gradients(fused=True, **overlap)):
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


def test_only_nvidia_s_apex_lets_local_layers_add_to_main_grad(monkeypatch):
    """PyPI has another package of that name."""
    config = make_config(Mesh(), model__transformer_impl="local")
    fields = lambda: transformer_config(config, read_architecture(families.hf_config("qwen2"), 64))  # noqa: E731
    found = importlib.util.find_spec
    assert not fields().gradient_accumulation_fusion
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, expected in (("apex", False), ("fused_weight_gradient_mlp_cuda", True)):
        monkeypatch.setattr(importlib.util, "find_spec", lambda n, *_, name=name: object() if n == name else found(n))
        assert fields().gradient_accumulation_fusion is expected
