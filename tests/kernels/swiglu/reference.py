"""The definition of SwiGLU in fp64, how far fp32 may be from it, and inputs for the tests."""

from __future__ import annotations

import torch
from torch import Tensor


def exact(x: Tensor, weights: Tensor | None, grad: Tensor) -> tuple[Tensor, ...]:
    """Return y, and the gradients to x and, if given, to the weights [T, 1], by autograd in fp64."""
    inputs = [t.detach().double().cpu().requires_grad_() for t in (x, weights) if t is not None]
    gate, up = inputs[0].chunk(2, -1)
    y = gate / (1 + (-gate).exp()) * up
    for weight in inputs[1:]:
        y = y * weight
    return y.detach(), *torch.autograd.grad(y, inputs, grad.double().cpu())


def fp32_errors(x: Tensor, weights: Tensor | None, grad: Tensor) -> tuple[Tensor, ...]:
    """Return how far fp32 arithmetic may be from `exact`, in its shapes.

    exp(-gate) has a relative error of |gate| · 2^-24, and the other operations have a few more. The terms of
    d silu = sigmoid + gate · sigmoid · (1 - sigmoid) have opposite signs below 0, so their sizes count.
    """
    gate, up = x.double().cpu().chunk(2, -1)
    weight = torch.ones(1, 1, dtype=torch.float64) if weights is None else weights.double().cpu()
    grad, sigmoid = grad.double().cpu(), 1 / (1 + (-gate).exp())
    relative = (10 + 2 * gate.abs()) * 2.0**-24
    y = (relative * gate * sigmoid * up).abs()
    slope = relative * sigmoid * (1 + gate.abs() * (1 - sigmoid))
    grad_x = torch.cat(((grad * weight * up).abs() * slope, (relative * grad * weight * gate * sigmoid).abs()), -1)
    return y * weight, grad_x, (y * grad.abs()).sum(-1, keepdim=True)


def problem(tokens: int, width: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Return x [T, 2·F], fp32 weights [T, 1] and a gradient [T, F]. Gates reach from -40 to 40."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 2 * width, generator=g)
    x[::3, :width] *= 10
    weights, grad = torch.rand(tokens, 1, generator=g), torch.randn(tokens, width, generator=g)
    return x.to(device, dtype), weights.to(device), grad.to(device, dtype)
