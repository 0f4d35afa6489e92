"""The Triton objective per token, against the PyTorch path in fp64."""

from __future__ import annotations

import pytest
import torch
from dapo_mcore.kernels.policy_loss import Objective, TokenInputs, torch_path

from tests.kernels.keywords import policy_loss
from tests.kernels.policy_loss.inputs import random_inputs
from tests.kernels.triton_here import DEVICE, UNAVAILABLE

if UNAVAILABLE:
    pytest.skip(UNAVAILABLE, allow_module_level=True)
from dapo_mcore.kernels.policy_loss import kernel

FIELDS = ("loss", "ratio", "clipped_low", "clipped_high", "clipped_dual", "kl")
pytestmark = [
    pytest.mark.usefixtures("small_blocks"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy evaluates both branches
]


@pytest.mark.parametrize("num_tokens", [0, 1, 63, 1000])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("dual", [None, 1.5])
def test_from_logprobs_it_equals_the_torch_path_in_fp64(num_tokens, estimator, dual):
    logprobs, tokens = random_inputs(num_tokens)
    options = {"dual_clip": dual, "kl_coef": 0.2, "kl_estimator": estimator}
    ours, exact = logprobs.clone().requires_grad_(), logprobs.double().requires_grad_()
    out = policy_loss(ours, **tokens._asdict(), **options, implementation="triton")
    wanted = policy_loss(exact, **{k: v.double() for k, v in tokens._asdict().items()}, **options)
    (3 * out.loss).backward()
    (3 * wanted.loss).backward()
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=2e-5, atol=1e-5)
    for field in FIELDS:
        torch.testing.assert_close(
            getattr(out, field).to(getattr(wanted, field).dtype), getattr(wanted, field), rtol=2e-5, atol=1e-5
        )
    if num_tokens == 1000:
        assert out.clipped_low.any() and out.clipped_high.any() and out.clipped_dual.any() == (dual is not None)


def test_cispo_equals_the_torch_path_in_fp64():
    logprobs, tokens = random_inputs(1000)
    objective = Objective(0.2, 0.28, kl_coef=0.2, form="cispo")
    ours = kernel.token_losses(logprobs, tokens, objective)
    exact = torch_path.token_losses(logprobs.double(), TokenInputs(*(x.double() for x in tokens)), objective)
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a.to(b.dtype), b, rtol=2e-5, atol=1e-5)
    assert ours.clipped_low.any() and ours.clipped_high.any() and not ours.clipped_dual.any()


def test_without_old_logprobs_the_ratio_is_exactly_one():
    logprobs, tokens = random_inputs(63)
    terms = kernel.token_losses(logprobs, TokenInputs(tokens.advantages, tokens.token_weights), Objective())
    assert terms.ratio.eq(1).all() and terms.kl.eq(0).all()
    assert torch.equal(terms.grad_logprobs, tokens.token_weights * -tokens.advantages)


@pytest.mark.parametrize("old", [-1e4, 1e4])
def test_no_gradient_and_no_overflow_outside_the_clamps(old):
    logprobs, tokens = random_inputs(20)
    far = torch.full_like(logprobs, old)
    tokens = tokens._replace(old_logprobs=far, ref_logprobs=far, old_kl_coefs=None)
    terms = kernel.token_losses(logprobs, tokens, Objective(kl_coef=0.1))
    assert terms.grad_logprobs.eq(0).all() and all(x.isfinite().all() for x in terms)


@pytest.mark.parametrize("x", [1e-9, 1e-7, 1e-4, 1e-2, 1.0, 2.5])
def test_k3_keeps_its_digits_near_zero(x):
    logprobs = torch.tensor([x, -x], device=DEVICE)
    ones, zeros = torch.ones(2, device=DEVICE), torch.zeros(2, device=DEVICE)
    terms = kernel.token_losses(logprobs, TokenInputs(zeros, ones, None, zeros), Objective(kl_coef=1.0))
    exact = -torch.expm1(-logprobs.double())
    torch.testing.assert_close(terms.grad_logprobs.double(), exact, rtol=3e-6, atol=0)


def test_k3_and_its_gradient_are_clamped_at_10():
    log_ratios = torch.tensor([-1e4, -19.0, -3.0, -2.0, 10.0, 12.0, 1e4, torch.nan], device=DEVICE)
    ones, zeros = torch.ones_like(log_ratios), torch.zeros_like(log_ratios)
    terms = kernel.token_losses(log_ratios, TokenInputs(zeros, ones, None, zeros), Objective(kl_coef=1.0))
    value, slope = torch_path.kl_terms(log_ratios.double(), "k3")
    assert (value == 10).tolist() == [True, True, True, False, False, True, True, False]
    torch.testing.assert_close(terms.kl.double(), value, rtol=3e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(terms.grad_logprobs.double()[:-1], slope[:-1], rtol=3e-6, atol=0)
