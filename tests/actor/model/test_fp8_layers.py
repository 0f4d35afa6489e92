"""Simulated FP8 products: each operand is quantized along the dim that its product sums over."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dapo_mcore.actor.model.fp8_layers import fp8_product, quantizer
from dapo_mcore.actor.model.fp8_numbers import quantize_mx, quantize_tensor, quantize_tiles
from dapo_mcore.actor.model.fp8_rules import FP32_SCALES, POWER_2_SCALES

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def represented(recipe: str, fmt: str) -> dict[str, torch.Tensor]:
    """Return output and gradients in fp64, from operands that the functions of numbers.py represent."""
    hidden, weight, gradient = operands()
    of_gradient = E5M2 if fmt == "hybrid" else E4M3

    def one(matrix: torch.Tensor, dtype: torch.dtype, along: int, square: bool = False) -> torch.Tensor:
        if recipe == "tensorwise":
            found = quantize_tensor(matrix, dtype)
        elif recipe == "blockwise":
            found = quantize_tiles(matrix, dtype, (128, 128) if square else (1, 128) if along else (128, 1))
        else:
            found = quantize_mx(matrix, dtype, (1, 32) if along else (32, 1))
        return found.values().double()

    return {
        "output": one(hidden, E4M3, 1) @ one(weight, E4M3, 1, square=True).T,
        "hidden": one(gradient, of_gradient, 1) @ one(weight, E4M3, 0, square=True),
        "weight": one(gradient, of_gradient, 0).T @ one(hidden, E4M3, 0),
    }


def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden [150, 272], weight [144, 272] and output gradient [150, 144], with rows and columns of unlike sizes."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(*shape, generator=generator) for shape in ((150, 272), (144, 272), (150, 144))]
    return tuple(
        matrix * torch.logspace(-2, 1, matrix.size(1)) * torch.logspace(0, 1, len(matrix))[:, None] for matrix in draw
    )


@pytest.mark.parametrize("shape", [(150,), (75, 2)])
@pytest.mark.parametrize(
    ("recipe", "fmt"), [("tensorwise", "hybrid"), ("blockwise", "e4m3"), ("blockwise", "hybrid"), ("mxfp8", "e4m3")]
)
def test_output_and_both_gradients_are_products_of_the_represented_operands(recipe, fmt, shape):
    hidden, weight, gradient = operands()
    hidden.requires_grad_()
    weight.requires_grad_()
    output = fp8_product(hidden.view(*shape, -1), weight, quantizer(recipe, fmt))
    assert output.shape == (*shape, 144)
    output.backward(gradient.view_as(output))
    found = {"output": output.detach().flatten(0, -2), "hidden": hidden.grad, "weight": weight.grad}
    for name, expected in represented(recipe, fmt).items():
        assert (found[name] - expected).norm() <= 1e-6 * expected.norm(), name
    plain = (hidden @ weight.T).detach()
    assert (found["output"] - plain).norm() > 0.01 * plain.norm()


def test_bf16_operands_give_bf16_results():
    hidden, weight, _ = (matrix.bfloat16().requires_grad_() for matrix in operands())
    output = fp8_product(hidden, weight, quantizer("blockwise", "e4m3"))
    output.sum().backward()
    assert output.dtype == hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("recipe", ["blockwise", "mxfp8"])
def test_a_token_does_not_depend_on_its_neighbours_except_with_one_scale_for_all(recipe):
    hidden, weight, _ = operands()
    others = torch.cat([hidden[:1], hidden[1:] * 100])
    for name, same in ((recipe, True), ("tensorwise", False)):
        first = [fp8_product(tokens, weight, quantizer(name, "e4m3"))[0] for tokens in (hidden, others)]
        assert torch.equal(*first) == same


def test_transformer_engines_variables_choose_the_kind_of_scales(monkeypatch):
    factor = lambda recipe: quantizer(recipe, "e4m3").activation(torch.full((1, 32), 3.0), 1).factors.item()  # noqa: E731
    assert (factor("blockwise"), factor("mxfp8")) == (1 / 128, 1 / 128)  # 448 / 3 = 149.3
    assert factor("tensorwise") == pytest.approx(3 / 448)
    monkeypatch.setenv(FP32_SCALES, "1")
    monkeypatch.setenv(POWER_2_SCALES, "1")
    assert (factor("tensorwise"), factor("mxfp8")) == (1 / 128, 1 / 128)
    assert factor("blockwise") == pytest.approx(3 / 448)


def test_recomputation_repeats_the_product_and_its_gradients_bitwise():
    fp8 = quantizer("blockwise", "hybrid")

    def layer(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.silu(fp8_product(hidden, weight, fp8))

    gradients = []
    for compute in (layer, partial(checkpoint, layer, use_reentrant=False)):
        hidden, weight, _ = (matrix.requires_grad_() for matrix in operands())
        compute(hidden, weight).square().sum().backward()
        gradients.append((hidden.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_zero_and_tiny_gradients_stay_finite_and_masked_tokens_give_exactly_nothing(recipe):
    """Tokens without loss, whole tiles of them, one value per tile, and values near the smallest of fp32."""
    hidden, weight, gradient = operands()
    gradient[3] = 0
    gradient[128:] = 0
    gradient[:, 128:] *= 1e-38
    gradient[40:80] *= 1e-7  # what a token-mean over ten million tokens gives
    hidden.requires_grad_()
    weight.requires_grad_()
    fp8_product(hidden, weight, quantizer(recipe, "e4m3")).backward(gradient)
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all() and weight.grad.norm() > 0
    assert not hidden.grad[3].any() and not hidden.grad[128:].any()
    assert hidden.grad[40:80].any() == (recipe != "tensorwise")  # one scale for all loses them


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_an_expert_without_tokens_has_a_gradient_of_zero(recipe):
    hidden, weight = torch.zeros(0, 64, requires_grad=True), torch.randn(32, 64, requires_grad=True)
    fp8_product(hidden, weight, quantizer(recipe, "e4m3")).sum().backward()
    assert hidden.grad.shape == (0, 64) and weight.grad.shape == (32, 64) and not weight.grad.any()
