"""The objective per token: results computed by hand, and random inputs against autograd of the textbook formula."""

from __future__ import annotations

import math

import pytest
import torch
from dapo_mcore.kernels.policy_head import reference
from dapo_mcore.kernels.policy_loss import Objective, TokenInputs, kl_terms, policy_loss_terms

from dapo_mcore.kernels import policy_loss as losses
from tests.kernels.keywords import policy_loss

# name: probability, old probability, advantage, dual clip → loss, d loss / d logp, flag that is set
BY_HAND = {
    "inside, A > 0": (0.6, 0.5, 2.0, None, -2.4, -2.4, None),  # r = 1.2
    "inside, A < 0": (0.45, 0.5, -2.0, None, 1.8, 1.8, None),  # r = 0.9
    "above 1.28, A > 0": (0.7, 0.5, 2.0, None, -2.56, 0.0, "clipped_high"),  # r = 1.4, loss -2 · 1.28
    "above 1.28, A < 0": (0.7, 0.5, -2.0, None, 2.8, 2.8, None),  # the pessimistic branch is -A · r
    "below 0.8, A > 0": (0.3, 0.5, 2.0, None, -1.2, -1.2, None),  # r = 0.6
    "below 0.8, A < 0": (0.3, 0.5, -2.0, None, 1.6, 0.0, "clipped_low"),  # 2 · 0.8
    "dual, A < 0": (0.8, 0.2, -2.0, 3.0, 6.0, 0.0, "clipped_dual"),  # r = 4, 8 capped at 2 · 3
    "below dual, A < 0": (0.5, 0.2, -2.0, 3.0, 5.0, 5.0, None),  # r = 2.5
    "dual leaves A > 0": (0.8, 0.2, 2.0, 3.0, -2.56, 0.0, "clipped_high"),
    "A = 0": (0.8, 0.2, 0.0, 3.0, 0.0, 0.0, None),
}
FLAGS = ("clipped_low", "clipped_high", "clipped_dual")


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def textbook(logprobs, tokens: TokenInputs, c: Objective):
    """Return token losses by the formulas of the papers, for autograd."""
    a, old = tokens.advantages, tokens.old_logprobs
    r = (logprobs - old).clamp(-20, 20).exp()
    loss = torch.maximum(-a * r, -a * r.clamp(1 - c.clip_low, 1 + c.clip_high))
    if c.dual_clip is not None:
        loss = torch.where(a < 0, torch.minimum(-a * c.dual_clip, loss), loss)
    loss = (loss + tokens.old_kl_coefs * (logprobs - old).abs()) * tokens.tis_weights
    x = logprobs - tokens.ref_logprobs
    return loss + c.kl_coef * {"k1": x, "k2": x**2 / 2, "k3": ((-x).exp() - 1 + x).clamp(max=10)}[c.kl_estimator]


def random_tokens(num: int, seed: int = 0) -> tuple[torch.Tensor, TokenInputs]:
    generator = torch.Generator().manual_seed(seed)
    normal = lambda: torch.randn(num, generator=generator, dtype=torch.float64)  # noqa: E731
    logprobs = -normal().abs()
    tis = normal().exp().clamp(max=2)
    tokens = TokenInputs(normal(), normal().abs() / num, logprobs + normal(), logprobs + normal(), tis)
    return logprobs, tokens._replace(old_kl_coefs=normal().clamp(min=0))


@pytest.mark.parametrize("case", BY_HAND)
def test_loss_gradient_and_flags_of_a_token_by_hand(case):
    p, old, advantage, dual, loss, grad, flag = BY_HAND[case]
    tokens = TokenInputs(f64(advantage), f64(1.0), f64(math.log(old)))
    terms = policy_loss_terms(f64(math.log(p)), tokens, Objective(0.2, 0.28, dual))
    assert terms.loss.item() == pytest.approx(loss, abs=1e-12)
    assert terms.grad_logprobs.item() == pytest.approx(grad, abs=1e-12)
    assert terms.ratio.item() == pytest.approx(p / old)
    assert [name for name in FLAGS if getattr(terms, name)] == ([flag] if flag else [])


@pytest.mark.parametrize(
    ("estimator", "kl", "slope"),
    [("k1", math.log(2), 1.0), ("k2", math.log(2) ** 2 / 2, math.log(2)), ("k3", math.log(2) - 0.5, 0.5)],
)
def test_kl_by_hand_adds_to_the_policy_term(estimator, kl, slope):
    """p = 0.5 under the policy, 0.25 under the reference; r = 1 and A = 3, TIS 0.5: the policy term is -1.5."""
    tokens = TokenInputs(f64(3.0), f64(1.0), f64(math.log(0.5)), f64(math.log(0.25)), f64(0.5))
    terms = policy_loss_terms(f64(math.log(0.5)), tokens, Objective(kl_coef=0.1, kl_estimator=estimator))
    assert terms.kl.item() == pytest.approx(kl)
    assert terms.loss.item() == pytest.approx(-1.5 + 0.1 * kl)
    assert terms.grad_logprobs.item() == pytest.approx(-1.5 + 0.1 * slope)


@pytest.mark.parametrize("dual", [None, 1.5])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_loss_and_gradient_match_autograd(estimator, dual):
    logprobs, tokens = random_tokens(500)
    objective = Objective(0.1, 0.3, dual, 0.2, estimator)
    plain = logprobs.clone().requires_grad_()
    expected = (tokens.token_weights * textbook(plain, tokens, objective)).sum()
    expected.backward()
    ours = logprobs.clone().requires_grad_()
    out = policy_loss(
        ours, **tokens._asdict(), clip_low=0.1, clip_high=0.3, dual_clip=dual, kl_coef=0.2, kl_estimator=estimator
    )
    (3 * out.loss).backward()
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(ours.grad, 3 * plain.grad, rtol=1e-12, atol=1e-15)
    assert out.clipped_low.any() and out.clipped_high.any() and out.clipped_dual.any() == (dual is not None)
    assert not any(field.requires_grad for field in out[1:])


def test_cispo_weighs_the_log_prob_of_every_token_by_the_clipped_ratio():
    # ratios 1.4 (above 1.28), 0.6 (below 0.8) and 0.9, so weights 1.28, 0.8 and 0.9; A = 2, -2, 2
    logprobs = f64(0.7, 0.3, 0.45).log()
    tokens = TokenInputs(f64(2.0, -2.0, 2.0), f64(1.0, 1.0, 1.0), f64(0.5, 0.5, 0.5).log())
    terms = policy_loss_terms(logprobs, tokens, Objective(0.2, 0.28, form="cispo"))
    torch.testing.assert_close(terms.grad_logprobs, f64(-2.56, 1.6, -1.8), rtol=1e-14, atol=0)
    torch.testing.assert_close(terms.loss, f64(-2.56, 1.6, -1.8) * logprobs, rtol=1e-14, atol=0)
    assert terms.clipped_high.tolist() == [True, False, False] and terms.clipped_low.tolist() == [False, True, False]
    above_only = policy_loss_terms(logprobs, tokens, Objective(1.0, 0.28, form="cispo"))
    torch.testing.assert_close(above_only.grad_logprobs, f64(-2.56, 1.2, -1.8), rtol=1e-14, atol=0)
    assert not above_only.clipped_low.any()


@pytest.mark.parametrize(("bounds", "cap"), [((0.0, 0.0), None), ((1.0, 0.5), 1.5)])
def test_cispo_is_verls_reinforce_with_bounds_that_leave_its_weight(bounds, cap):
    """verl b178a3c (trainer/ppo/core_algos.py, compute_policy_loss_reinforce): -A · log π · w, where w is 1 or min(π / π_rollout, cap)."""
    logprobs, tokens = random_tokens(500)
    tokens = tokens._replace(tis_weights=None, old_kl_coefs=None, ref_logprobs=None)
    logprobs.requires_grad_()
    weights = 1.0 if cap is None else (logprobs - tokens.old_logprobs).clamp(-20, 20).exp().clamp(max=cap).detach()
    loss = -tokens.advantages * logprobs * weights
    (expected,) = torch.autograd.grad(loss.sum(), logprobs)
    terms = policy_loss_terms(logprobs.detach(), tokens, Objective(*bounds, form="cispo"))
    torch.testing.assert_close(terms.loss, loss.detach(), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(terms.grad_logprobs, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
def test_cispo_is_the_gradient_of_the_definition_by_autograd(entropy_coef):
    logprobs, tokens = random_tokens(500)
    objective = Objective(0.1, 0.3, None, 0.2, "k3", entropy_coef, "cispo")
    entropy = logprobs.exp()
    plain, ours = logprobs.clone().requires_grad_(), logprobs.clone().requires_grad_()
    expected = reference.loss_of_tokens(plain, entropy, tokens, objective)
    out = losses.policy_loss(ours, tokens, objective, entropy=entropy)
    expected.loss.backward()
    out.loss.backward()
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-12, atol=1e-15)
    assert torch.equal(out.clipped_low, expected.clipped_low) and torch.equal(out.clipped_high, expected.clipped_high)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("old", [-1e4, 1e4])
def test_no_gradient_and_no_overflow_outside_the_ratio_clamp(old, dtype):
    logprobs = torch.full((3,), -1.0, dtype=dtype)
    tokens = TokenInputs(logprobs.new_tensor([-1.0, 0.0, 1.0]), torch.ones_like(logprobs), logprobs.new_full((3,), old))
    terms = policy_loss_terms(logprobs, tokens, Objective())
    assert terms.grad_logprobs.eq(0).all() and terms.loss.isfinite().all()
    assert terms.ratio.tolist() == pytest.approx([math.exp(math.copysign(20, -old))] * 3, rel=1e-5)


# verl 0.9.1's kl_penalty("k3") and its autograd: clamp(exp(-x) - 1 + x, max=10)
K3_AT = {
    -1e4: (10, 0),
    -3.0: (10, 0),  # e^3 - 4 = 16.1
    -2.0: (math.exp(2) - 3, 1 - math.exp(2)),
    0.0: (0, 0),
    10.0: (math.exp(-10) + 9, 1 - math.exp(-10)),
    12.0: (10, 0),
    1e4: (10, 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_and_its_gradient_are_clamped_at_10(dtype):
    log_ratio = torch.tensor(list(K3_AT), dtype=dtype, requires_grad=True)
    value, slope = kl_terms(log_ratio, "k3")
    (by_autograd,) = torch.autograd.grad(value.sum(), log_ratio)
    expected = torch.tensor(list(K3_AT.values()), dtype=dtype)
    torch.testing.assert_close(torch.stack([value, slope], 1), expected)
    torch.testing.assert_close(by_autograd, expected[:, 1])


def test_the_other_estimators_are_not_clamped():
    far = f64(-1e3, 1e3)
    assert [term.tolist() for term in kl_terms(far, "k1")] == [[-1e3, 1e3], [1, 1]]
    assert [term.tolist() for term in kl_terms(far, "k2")] == [[5e5, 5e5], [-1e3, 1e3]]


def test_a_kl_of_nan_stays_nan():
    assert all(term.isnan().all() for term in kl_terms(f64(math.nan), "k3"))


def law(seed: int) -> torch.Tensor:
    return torch.randn(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 2


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_expectation_over_the_policy_is_the_kl(estimator):
    logp, ref = law(0).log_softmax(0), law(1).log_softmax(0)
    estimate, _ = kl_terms(logp - ref, estimator)
    assert (logp.exp() * estimate).sum().item() == pytest.approx((logp.exp() * (logp - ref)).sum().item(), rel=1e-12)


def test_k2_has_the_gradient_of_the_kl_on_average():
    logits, ref = law(0).requires_grad_(), law(1).log_softmax(0)
    logp = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)
    _, slope = kl_terms((logp - ref).detach(), "k2")
    (estimate,) = torch.autograd.grad(logp, logits, grad_outputs=logp.exp().detach() * slope)
    torch.testing.assert_close(estimate, exact, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("advantage", [-2.0, 2.0])
def test_on_the_clip_boundary_the_token_still_learns(advantage):
    terms = policy_loss_terms(f64(-1.0), TokenInputs(f64(advantage), f64(1.0)), Objective(clip_low=0, clip_high=0))
    assert terms.ratio.item() == 1 and terms.grad_logprobs.item() == -advantage
    assert not terms.clipped_low and not terms.clipped_high


def test_without_old_logprobs_advantage_one_is_weighted_likelihood():
    logprobs = f64(-3.0, -0.1, -1e-9).requires_grad_()
    weights = f64(0.5, 0.25, 0.0)
    out = policy_loss(logprobs, advantages=torch.ones(3), token_weights=weights)
    out.loss.backward()
    assert out.ratio.tolist() == [1, 1, 1]
    assert logprobs.grad.tolist() == (-weights).tolist()


def test_entropy_bonus_reaches_the_caller_s_entropy():
    logprobs, entropy = f64(-1.0, -2.0).requires_grad_(), f64(0.5, 1.5).requires_grad_()
    weights = f64(0.25, 0.75)
    out = policy_loss(logprobs, advantages=f64(0, 0), token_weights=weights, entropy=entropy, entropy_coef=0.1)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(-0.1 * (0.25 * 0.5 + 0.75 * 1.5))
    assert entropy.grad.tolist() == pytest.approx([-0.025, -0.075])


def test_no_tokens_give_a_zero_loss_on_the_graph():
    logprobs = torch.zeros(0, requires_grad=True)
    out = policy_loss(logprobs, advantages=torch.zeros(0), token_weights=torch.zeros(0), old_logprobs=torch.zeros(0))
    out.loss.backward()
    assert out.loss.item() == 0 and logprobs.grad.shape == (0,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logprobs": torch.zeros(2, 1)}, r"logprobs must be \[T\].*\[2, 1\]"),
        ({"logprobs": torch.zeros(2, dtype=torch.bfloat16)}, r"got \[2\] in torch.bfloat16"),
        ({"advantages": torch.zeros(3)}, r"advantages has shape \[3\], but there are 2 tokens"),
        ({"entropy_coef": 0.1}, r"entropy_coef 0.1 needs `entropy` \[2\]"),
    ],
)
def test_wrong_arguments_raise_errors_that_explain(changes, message):
    arguments = {"logprobs": torch.zeros(2), "advantages": torch.zeros(2), "token_weights": torch.zeros(2)} | changes
    with pytest.raises(ValueError, match=message):
        policy_loss(arguments.pop("logprobs"), **arguments)
