"""The layer and the epsilon of latent attention that megatron-core lacks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer import multi_latent_attention

from dapo_mcore.actor.model.latent import LATENT_EPS, ReplicatedLinear, set_latent_eps, use_replicated_linear

CONFIG = SimpleNamespace(use_cpu_initialization=True, params_dtype=torch.float64, sequence_parallel=True)


def fill(weight: torch.Tensor) -> None:
    with torch.no_grad():
        weight.copy_(torch.tensor([[1.0, 0.0, 2.0], [0.0, -1.0, 1.0]]))


def test_a_replicated_layer_projects_each_token_and_has_no_bias():
    layer = ReplicatedLinear(3, 2, config=CONFIG, init_method=fill, bias=False, skip_bias_add=False)
    output, bias = layer(torch.tensor([[[1.0, 2.0, 3.0]]], dtype=torch.float64))
    assert output.tolist() == [[[7.0, 1.0]]] and bias is None
    assert layer.weight.sequence_parallel, "each rank sees only its own tokens, so gradients must be summed"
    with pytest.raises(AssertionError):
        ReplicatedLinear(3, 2, config=CONFIG, init_method=fill, bias=True)


def test_upstream_takes_a_replicated_layer_for_transformer_engines(monkeypatch):
    monkeypatch.setattr(multi_latent_attention, "TELinear", None)
    use_replicated_linear()
    assert multi_latent_attention.TELinear is ReplicatedLinear


class Norm(torch.nn.Module):
    eps = 1e-3


class Attention(multi_latent_attention.MLASelfAttention):
    """Latent attention without a latent vector for queries; the norm of keys and values is part of their projection."""

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.linear_q_proj, self.linear_kv_up_proj = torch.nn.Linear(2, 2), Norm()


def test_only_norms_of_latent_vectors_get_their_own_epsilon():
    model = torch.nn.ModuleDict({"norm": Norm(), "first": Attention(), "second": Attention()})
    model.second.q_layernorm = Norm()
    set_latent_eps(model)
    assert model.norm.eps == 1e-3
    assert model.first.linear_kv_up_proj.eps == model.second.q_layernorm.eps == LATENT_EPS
    assert not hasattr(model.first.linear_q_proj, "eps")
