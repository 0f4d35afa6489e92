"""Gradients that exist before the backward pass: they reach the inputs, times the incoming gradient."""

from __future__ import annotations

import pytest
import torch
from dapo_mcore.kernels.policy_loss.autograd import with_gradients


def test_each_input_gets_its_gradient_times_the_incoming_one():
    a, b, frozen = (torch.zeros(n, requires_grad=n < 4) for n in (2, 3, 4))
    loss = with_gradients(torch.tensor(5.0), (a, b, frozen), (torch.tensor([1.0, -2.0]), torch.ones(3), None))
    assert loss.item() == 5.0
    (-3 * loss).backward()
    assert a.grad.tolist() == [-3.0, 6.0] and b.grad.tolist() == [-3.0] * 3
    assert frozen.grad is None


def test_the_last_backward_pass_multiplies_in_the_memory_of_the_gradient():
    leaf, gradient = torch.zeros(2, requires_grad=True), torch.tensor([1.0, -2.0])
    loss = with_gradients(torch.tensor(0.0), (leaf,), (gradient,))
    (4 * loss).backward(retain_graph=True)
    assert leaf.grad.tolist() == [4.0, -8.0] and gradient.tolist() == [1.0, -2.0]
    loss.mul(3).backward()
    assert leaf.grad.tolist() == [7.0, -14.0] and gradient.tolist() == [3.0, -6.0]
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_a_second_derivative_is_refused():
    leaf = torch.ones(1, requires_grad=True)
    loss = with_gradients(torch.tensor(0.0), (leaf,), (torch.ones(1),))
    (first,) = torch.autograd.grad(loss * leaf.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
