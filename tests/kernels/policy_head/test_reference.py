"""The definition of the policy head against results computed by hand. All other implementations are compared with it.

Two tokens of probability 1/4 and 3/4: logits 0 and ln 3, from weights (0, 2 ln 3), hidden 1, temperature 2; a padding row.
"""

from __future__ import annotations

from math import log

import pytest
import torch
from dapo_mcore.kernels.policy_head.reference import linear_policy_loss
from dapo_mcore.kernels.policy_loss import Objective, TokenInputs

LN3, QUARTER, THREE_QUARTERS = log(3), log(1 / 4), log(3 / 4)


def solve(ratios, advantages, targets, objective=Objective(), dtype=torch.float64, **more):  # noqa: B008
    """Return output and gradients for tokens with the given ratios and with token weights 1, 2, 3, …"""
    number = len(ratios)
    hidden = torch.ones(number, 1, dtype=dtype, requires_grad=True)
    weight = torch.tensor([[0.0], [2 * LN3], [50.0]], dtype=dtype, requires_grad=True)
    logprobs = torch.tensor([QUARTER, THREE_QUARTERS], dtype=dtype)[targets]
    old = logprobs - torch.tensor(ratios, dtype=dtype).log()
    given = {name: torch.tensor(values, dtype=dtype) for name, values in more.items()}
    tokens = TokenInputs(torch.tensor(advantages, dtype=dtype), torch.arange(1, number + 1).to(dtype), old, **given)
    targets = torch.tensor(targets)
    out = linear_policy_loss(hidden, weight, targets, tokens, objective, temperature=2.0, vocab_size=2)
    out.loss.backward()
    return out, hidden.grad, weight.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_branch_of_the_objective(dtype):
    """Clipped high, clipped low, dual clip, and not clipped: losses -1.28, 0.8, 4 and -1."""
    out, grad_hidden, grad_weight = solve(
        [2.0, 0.5, 3.0, 1.0], [1.0, -1.0, -2.0, 1.0], [0, 0, 0, 1], Objective(dual_clip=2.0), dtype
    )
    assert out.loss.item() == pytest.approx(-1.28 + 2 * 0.8 + 3 * 4 - 4 * 1)
    assert out.logprobs.tolist() == pytest.approx([QUARTER] * 3 + [THREE_QUARTERS])
    assert out.entropy.tolist() == pytest.approx([-(QUARTER + 3 * THREE_QUARTERS) / 4] * 4)
    assert out.ratio.tolist() == pytest.approx([2, 0.5, 3, 1])
    flags = [out.clipped_high.tolist(), out.clipped_low.tolist(), out.clipped_dual.tolist()]
    assert flags == [[True, False, False, False], [False, True, False, False], [False, False, True, False]]
    # d logp / d hidden = (w_1 - (0 · 1/4 + w_1 · 3/4)) / 2 = 2 ln 3 / 8
    assert grad_hidden[:, 0].tolist() == pytest.approx([0, 0, 0, -4 * LN3 / 4])
    assert grad_weight[:, 0].tolist() == pytest.approx([4 / 8, -4 / 8, 0])


@pytest.mark.parametrize(
    ("estimator", "kl", "slope"), [("k1", log(2), 1), ("k2", log(2) ** 2 / 2, log(2)), ("k3", log(2) - 0.5, 0.5)]
)
def test_kl_where_the_policy_has_twice_the_probability_of_the_reference(estimator, kl, slope):
    objective = Objective(kl_coef=0.1, kl_estimator=estimator)
    out, grad_hidden, _ = solve([1.0], [0.0], [1], objective, ref_logprobs=[THREE_QUARTERS - log(2)])
    assert out.kl.item() == pytest.approx(kl) and out.loss.item() == pytest.approx(0.1 * kl)
    assert grad_hidden.item() == pytest.approx(0.1 * slope * LN3 / 4)


def test_importance_weights_multiply_the_policy_term_and_the_entropy_bonus_is_subtracted():
    objective = Objective(entropy_coef=0.5)
    out, grad_hidden, _ = solve([1.0], [1.0], [1], objective, tis_weights=[3.0])
    assert out.loss.item() == pytest.approx(-3 - 0.5 * out.entropy.item())
    # d entropy / d hidden = -Σ p log p · (logit - mean), of logits 0 and ln 3 per unit of hidden: -3/16 · (ln 3)²
    assert grad_hidden.item() == pytest.approx(-3 * LN3 / 4 + 0.5 * 3 / 16 * LN3**2)


def test_a_ratio_beyond_its_limit_has_no_gradient():
    out, grad_hidden, _ = solve([2.0**40], [-1.0], [1])
    assert out.ratio.item() == pytest.approx(torch.tensor(20.0, dtype=torch.float64).exp().item())
    assert grad_hidden.item() == 0
