"""What SwiGLU keeps for the backward pass, its gradients through autograd, and which arguments are refused."""

from __future__ import annotations

import pytest
import torch
from dapo_mcore.kernels.swiglu import swiglu, torch_path
from torch.autograd.graph import saved_tensors_hooks

from tests.kernels.swiglu.reference import problem


def kept(*arguments, **options) -> list[torch.Tensor]:
    """Return the tensors that a call keeps for its backward pass."""
    found: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda tensor: found.append(tensor) or tensor, lambda tensor: tensor):
        swiglu(*arguments, **options).sum().backward()
    return found


def test_only_the_input_and_the_weights_are_kept():
    x, weights, _ = problem(6, 10, torch.float32)
    x.requires_grad_()
    assert [t.data_ptr() for t in kept(x)] == [x.data_ptr()]
    assert [t.data_ptr() for t in kept(x, weights)] == [x.data_ptr(), weights.data_ptr()]


def test_the_input_can_be_kept_in_fp8():
    x, weights, grad = problem(6, 10, torch.float32)
    x.requires_grad_(), weights.requires_grad_()
    assert [t.dtype for t in kept(x, saved_dtype=torch.float8_e4m3fn)] == [torch.float8_e4m3fn]
    x.grad = None
    y = swiglu(x, weights, saved_dtype=torch.float8_e4m3fn)
    y.backward(grad)
    rounded = x.detach().to(torch.float8_e4m3fn).float()
    expected = torch_path.backward(grad, rounded, weights.detach())
    assert torch.equal(y.detach(), torch_path.forward(x.detach(), weights.detach()))
    assert torch.equal(x.grad, expected[0]) and torch.equal(weights.grad, expected[1])


def test_gradients_through_strided_rows_and_weights_of_one_dim():
    x, weights, _ = problem(5, 4, torch.float64)
    wide = torch.cat([x, x], 1).requires_grad_()
    weights = weights[:, 0].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: swiglu(x[:, 3:11], w), (wide, weights))


def test_no_tokens():
    x = torch.zeros(0, 6, requires_grad=True)
    swiglu(x, torch.zeros(0)).sum().backward()
    assert x.grad.shape == (0, 6)


@pytest.mark.parametrize(
    ("x", "weights", "message"),
    [
        (torch.zeros(2, 5), None, r"x must be a floating \[T, 2·F\].*got \[2, 5\] in torch.float32"),
        (torch.zeros(2, 3, 4), None, r"got \[2, 3, 4\]"),
        (torch.zeros(2, 4, dtype=torch.int64), None, "in torch.int64"),
        (torch.zeros(4, 2).t(), None, r"strides \[1, 2\].*needs .contiguous\(\)"),
        (
            torch.zeros(2, 4),
            torch.zeros(3),
            r"weights must be floating \[2\] or \[2, 1\] on cpu.*got torch.float32 \[3\]",
        ),
        (torch.zeros(2, 4), torch.zeros(2, dtype=torch.int32), "got torch.int32"),
    ],
)
def test_wrong_arguments_are_refused(x, weights, message):
    with pytest.raises(ValueError, match=message):
        swiglu(x, weights)
