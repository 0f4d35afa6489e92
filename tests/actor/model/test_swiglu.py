"""The SwiGLU of Megatron's MLPs: all of them call ours, the bits on a CPU stay megatron-core's, and its options still work."""

from __future__ import annotations

import re
from pathlib import Path

import megatron.core
import pytest
import torch
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from torch.autograd.graph import saved_tensors_hooks

from dapo_mcore.actor.model import swiglu
from dapo_mcore.actor.model.policy import build_policy
from dapo_mcore.actor.model.swiglu import bias_swiglu_impl, use_own_swiglu, weighted_bias_swiglu_impl
from tests.actor import families
from tests.actor.parity import Mesh, make_config

FAMILIES = ("qwen2", "qwen2-moe", "deepseek-v3")
"""Together: dense MLPs, experts and shared experts."""


def step(model: torch.nn.Module, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the hidden states of random tokens, and the gradients of a random loss."""
    noise = torch.Generator().manual_seed(seed)
    tokens = torch.randint(families.VOCAB, (1, 24), generator=noise)
    model.zero_grad()
    hidden = model(tokens, torch.arange(24)[None], None)
    (hidden * torch.randn(hidden.shape, generator=noise)).sum().backward()
    return hidden.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def filled(layout, family: str, **overrides) -> torch.nn.Module:
    (model,) = build_policy(make_config(Mesh(), **overrides), families.hf_config(family), layout)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2, generator=noise)
    return model


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_cpu_the_bits_are_those_of_megatrons_own_formula(alone, monkeypatch, family, dtype):
    model, calls = filled(alone, family, model__dtype=dtype), []
    monkeypatch.setattr(
        swiglu, "swiglu", lambda *a, _ours=swiglu.swiglu, **k: calls.append(len(a[0])) or _ours(*a, **k)
    )
    hidden, grads = step(model, 1)
    assert len(calls) >= model.config.num_layers
    for module in model.modules():
        if hasattr(module, "config"):  # experts have a copy
            module.config.bias_activation_fusion = False
    calls.clear()
    expected_hidden, expected = step(model, 1)
    assert not calls and torch.equal(hidden, expected_hidden) and grads.keys() == expected.keys()
    assert all(torch.equal(grads[name], expected[name]) for name in expected)


def test_every_module_of_megatron_that_computes_a_swiglu_calls_ours():
    use_own_swiglu()
    folder = Path(megatron.core.__path__[0])
    users = {path for path in folder.rglob("*.py") if "bias_swiglu_impl" in path.read_text(encoding="utf-8")}
    ours = {Path(module.__file__) for module in swiglu.CALLERS}
    assert users - ours == {folder / "fusions" / "fused_bias_swiglu.py"}
    for module in swiglu.CALLERS:
        names = set(
            re.findall(r"\b(?:weighted_)?bias_swiglu_impl\b", Path(module.__file__).read_text(encoding="utf-8"))
        )
        assert names and all(getattr(module, name) is getattr(swiglu, name) for name in names)


@pytest.mark.parametrize("field", ["activation_func_clamp_value", "glu_linear_offset"])
def test_another_swiglu_of_the_megatron_section_is_computed(alone, field):
    """megatron-core's fused SwiGLU ignores the first and refuses the second."""
    plain, _ = step(filled(alone, "qwen2"), 1)
    changed, _ = step(filled(alone, "qwen2", megatron={field: 0.01 if "clamp" in field else 0.5}), 1)
    assert not torch.allclose(plain, changed, rtol=1e-2)


def test_the_input_is_kept_in_fp8_if_asked_for(alone):
    kept: list[torch.dtype] = []
    model = filled(alone, "qwen2", megatron={"activation_func_fp8_input_store": True})
    with saved_tensors_hooks(lambda tensor: kept.append(tensor.dtype) or tensor, lambda tensor: tensor):
        hidden, grads = step(model, 1)
    assert kept.count(torch.float8_e4m3fn) == model.config.num_layers
    plain_hidden, plain = step(filled(alone, "qwen2"), 1)
    assert torch.equal(hidden, plain_hidden)
    name = "decoder.layers.2.mlp.linear_fc1.weight"
    assert 0 < (grads[name] - plain[name]).norm() < 0.1 * plain[name].norm()


def test_an_input_is_marked_for_activation_offloading_and_a_bias_is_added():
    x, bias, marked = torch.randn(2, 3, 8, requires_grad=True), torch.randn(8), []
    with saved_tensors_hooks(lambda t: marked.append(getattr(t, "activation_offloading", False)) or t, lambda t: t):
        y = bias_swiglu_impl(x, None, False, True)
        bias_swiglu_impl(x, None)
    assert marked == [True, False] and y.shape == (2, 3, 4)
    torch.testing.assert_close(bias_swiglu_impl(x, bias), bias_swiglu_impl(x + bias, None))
    weights = torch.rand(6, 1)
    weighted = weighted_bias_swiglu_impl(x.flatten(0, 1), bias, weights)
    torch.testing.assert_close(weighted, bias_swiglu_impl(x + bias, None).flatten(0, 1) * weights)


def test_the_recomputed_activation_of_experts_has_the_same_gradients(alone):
    """As model.recompute=[moe_act] does in Transformer Engine's experts: the output is dropped, and computed again."""
    x, weights, after = torch.randn(5, 8, requires_grad=True), torch.rand(5, 1, requires_grad=True), torch.randn(4, 3)
    (weighted_bias_swiglu_impl(x, None, weights) @ after).sin().sum().backward()
    expected = x.grad.clone(), weights.grad.clone()
    x.grad = weights.grad = None
    recomputed = CheckpointWithoutOutput(fp8=None)  # upstream: False asks for Transformer Engine
    y = recomputed.checkpoint(weighted_bias_swiglu_impl, x, None, weights)
    out = y @ after
    recomputed.discard_output_and_register_recompute(out)
    assert y.untyped_storage().nbytes() == 0
    out.sin().sum().backward()
    assert torch.equal(x.grad, expected[0]) and torch.equal(weights.grad, expected[1])
