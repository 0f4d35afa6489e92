"""KL estimators on hand-computed values, and unbiasedness over a whole vocabulary."""

import math

import numpy as np
import pytest
import torch

from dapo_mcore.algo.kl import kl_estimate, penalised_rewards


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("k1", math.log(2)), ("k2", math.log(2) ** 2 / 2), ("k3", 0.5 - 1 + math.log(2))],
)
def test_by_hand(kind, expected):
    # p = 0.5, p_ref = 0.25: d = log(p_ref / p) = -log 2, e^d = 1/2
    value = kl_estimate(torch.tensor([0.5]).log(), torch.tensor([0.25]).log(), kind)
    assert value.item() == pytest.approx(expected, rel=1e-6)


def law(seed):
    return torch.randn(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_expectation_over_the_policy_is_the_kl(kind):
    logp, ref = law(0).log_softmax(0), law(1).log_softmax(0)
    expected = (logp.exp() * (logp - ref)).sum()
    assert (logp.exp() * kl_estimate(logp, ref, kind)).sum().item() == pytest.approx(expected.item(), rel=1e-12)


def test_k2_has_the_gradient_of_the_kl_on_average():
    logits, ref = law(0).requires_grad_(), law(1).log_softmax(0)
    logp = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)
    (estimate,) = torch.autograd.grad((logp.exp().detach() * kl_estimate(logp, ref, "k2")).sum(), logits)
    torch.testing.assert_close(estimate, exact, rtol=1e-10, atol=1e-14)


def test_k3_is_never_negative_and_survives_extreme_ratios():
    estimate = kl_estimate(torch.tensor([-1e4, 0.0, -1.0]), torch.tensor([0.0, -1e4, -1.0]), "k3")
    assert estimate.isfinite().all() and (estimate >= 0).all() and estimate[2] == 0


def test_penalised_rewards():
    np.testing.assert_allclose(penalised_rewards(np.array([1.0, -1.0]), np.array([2.0, 0.5]), 0.1), [0.8, -1.05])
