"""Eager gradient mode: the forward pass adds dW to main_grad once, and marks it for Megatron's DDP."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.kernels.keywords import linear_policy_loss
from tests.kernels.policy_head.exact import EVERYTHING, problem, run
from tests.kernels.triton_here import DEVICE, IMPLEMENTATIONS

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(params=IMPLEMENTATIONS)
def case(request):
    """Return hidden and weight as parameters, targets and options; few tokens, because Triton's interpreter is slow."""
    hidden, weight, targets, inputs = problem(10, dtype=torch.float32, device=DEVICE)
    options = {**inputs, **EVERYTHING, "chunk_tokens": 4, "implementation": request.param}
    return torch.nn.Parameter(hidden), torch.nn.Parameter(weight), targets, options


def test_main_grad_and_hidden_get_the_gradients_of_the_other_mode(case):
    hidden, weight, targets, options = case
    plain, hidden_grad, weight_grad = run(hidden, weight, targets, **options)
    main_grad = torch.ones_like(weight)
    out = linear_policy_loss(hidden, weight, targets, main_grad=main_grad, **options)
    torch.testing.assert_close(main_grad - 1, weight_grad, rtol=1e-4, atol=1e-6)  # before any backward pass
    out.loss.backward()
    assert torch.equal(out.loss, plain.loss) and torch.equal(out.logprobs, plain.logprobs)
    assert torch.equal(hidden.grad, hidden_grad)
    assert weight.grad_added_to_main_grad and weight.grad.eq(0).all()


@pytest.mark.parametrize("scale", [0.25, 1024.0, 0.1])
def test_a_scaled_loss_needs_its_scale_in_the_forward_pass(case, scale):
    hidden, weight, targets, options = case
    _, hidden_grad, weight_grad = run(hidden, weight, targets, **options)
    main_grad = torch.zeros_like(weight)
    out = linear_policy_loss(hidden, weight, targets, main_grad=main_grad, grad_scale=scale, **options)
    (out.loss * scale).backward()
    torch.testing.assert_close(main_grad, scale * weight_grad, rtol=1e-5, atol=1e-6 * scale)
    torch.testing.assert_close(hidden.grad, scale * hidden_grad, rtol=1e-6, atol=0)


@pytest.mark.skipif(DEVICE == "cuda", reason="a device-side assertion ends the process")
def test_another_loss_scale_fails(case):
    hidden, weight, targets, options = case
    out = linear_policy_loss(hidden, weight, targets, main_grad=torch.zeros_like(weight), **options)
    with pytest.raises(ValueError, match=r"added grad_scale 1.0 .* must receive 1.0, but got 2.0"):
        (2 * out.loss).backward()


def test_refused_without_gradients(case):
    hidden, weight, targets, options = case
    main_grad = torch.zeros_like(weight)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"under torch\.no_grad"):
        linear_policy_loss(hidden, weight, targets, main_grad=main_grad, **options)
    assert main_grad.eq(0).all()


@pytest.mark.parametrize(("reentrant", "message"), [(True, r"under torch\.no_grad"), (False, "while a backward pass")])
def test_refused_under_activation_checkpointing(case, reentrant, message):
    """A reentrant checkpoint has no gradients in its first pass; the other kind is refused in its replay."""
    hidden, weight, targets, options = case
    main_grad = torch.zeros_like(weight)

    def head(x):
        return linear_policy_loss(x * 2, weight, targets, main_grad=main_grad, **options).loss

    with pytest.raises(RuntimeError, match=message):
        checkpoint(head, hidden, use_reentrant=reentrant).backward()


def test_a_shared_embedding_keeps_its_gradient_under_ddp_hooks(case):
    """The DDP hook of megatron-core 0.16 drops weight.grad unless zero_out_wgrad is set; then the dummy must be zero."""
    hidden, weight, targets, options = case
    weight.grad_added_to_main_grad, weight.zero_out_wgrad = False, True
    main_grad = torch.zeros_like(weight)
    torch.use_deterministic_algorithms(True)  # fills the result of torch.empty with nan
    try:
        out = linear_policy_loss(hidden, weight, targets, main_grad=main_grad, **options)
        (out.loss + weight[3].sum()).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    embedding = torch.zeros_like(weight)
    embedding[3] = 1
    assert weight.grad_added_to_main_grad and torch.equal(weight.grad, embedding)


def test_no_tokens_leave_main_grad_alone(case):
    hidden, weight, targets, options = case
    none = {name: value[:0] if torch.is_tensor(value) else value for name, value in options.items()}
    main_grad = torch.zeros_like(weight)
    out = linear_policy_loss(hidden[:0], weight, targets[:0], main_grad=main_grad, **none)
    out.loss.backward()
    assert main_grad.eq(0).all() and weight.grad_added_to_main_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"main_grad": torch.zeros(36, 24)}, r"main_grad must be torch.float32 \[37, 24\].* got .*\[36, 24\]"),
        ({"main_grad": torch.zeros(37, 24).double()}, "got torch.float64"),
        ({"main_grad": torch.zeros(24, 37).t()}, "main_grad must be contiguous"),
        ({"grad_scale": 2.0}, "grad_scale 2.0 is for main_grad"),
    ],
)
def test_wrong_arguments_raise_errors_that_explain(changes, message):
    hidden, weight, targets, inputs = problem(4, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(hidden, weight.requires_grad_(), targets, **inputs, **changes)


def test_a_frozen_weight_has_no_main_grad():
    hidden, weight, targets, inputs = problem(4, dtype=torch.float32)
    with pytest.raises(ValueError, match="does not require a gradient"):
        linear_policy_loss(hidden.requires_grad_(), weight, targets, main_grad=torch.zeros(37, 24), **inputs)
