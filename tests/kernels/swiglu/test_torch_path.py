"""SwiGLU in PyTorch: the bits of autograd on the plain formula, in every dtype, and hand-computed numbers."""

from __future__ import annotations

import math

import pytest
import torch
from dapo_mcore.kernels.swiglu import torch_path
from torch.nn.functional import silu

from tests.kernels.swiglu.reference import exact, problem


def test_the_gate_is_the_first_half_of_a_row():
    # silu(0) = 0, silu(ln 3) = 3/4 · ln 3; the weight is 2
    x = torch.tensor([[0.0, math.log(3), 5.0, 4.0]], dtype=torch.float64)
    expected = torch.tensor([[0.0, 6 * math.log(3)]], dtype=torch.float64)
    torch.testing.assert_close(torch_path.forward(x, torch.tensor([[2.0]])), expected)
    # silu'(0) = 1/2, silu'(ln 3) = 3/4 + 3/16 · ln 3
    grad_x, grad_weights = torch_path.backward(torch.ones(1, 2, dtype=torch.float64), x, torch.tensor([[2.0]]))
    slope = 0.75 + 0.1875 * math.log(3)
    expected = torch.tensor([[5.0, 8 * slope, 0.0, 1.5 * math.log(3)]], dtype=torch.float64)
    torch.testing.assert_close(grad_x, expected)
    torch.testing.assert_close(grad_weights, torch.tensor([[3 * math.log(3)]]))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bits_are_those_of_autograd(dtype, weighted):
    x, weights, grad = problem(50, 33, dtype)
    inputs = [x.requires_grad_(), *([weights.requires_grad_()] if weighted else [])]
    gate, up = x.chunk(2, -1)
    y = (silu(gate) * up * weights).to(dtype) if weighted else silu(gate) * up
    expected = torch.autograd.grad(y, inputs, grad)
    with torch.no_grad():
        given = weights if weighted else None
        assert torch.equal(torch_path.forward(x, given), y)
        found = torch_path.backward(grad, x, given)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected))


def test_fp64_is_exact():
    x, weights, grad = problem(50, 33, torch.float64)
    found = torch_path.forward(x, weights), *torch_path.backward(grad, x, weights)
    for ours, expected in zip(found, exact(x, weights, grad)):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-6 if ours.dtype == torch.float32 else 1e-12, atol=0)
