"""Inputs for the policy head's tests, and the expected output from the definition (policy_head/reference.py) in fp64.

Change here: the inputs and the tolerances of the comparison.
"""

from __future__ import annotations

import torch
from dapo_mcore.kernels.policy_head import linear_logprobs, reference

from tests.kernels.keywords import linear_policy_loss, split

EVERYTHING = {"dual_clip": 1.5, "kl_coef": 0.1, "entropy_coef": 0.02, "temperature": 0.7}
# options that change how the result is computed, but not the result
METHOD = ("chunk_tokens", "logits_dtype", "implementation", "main_grad", "grad_scale")


def exact(hidden, weight, targets, **options):
    """Return the definition's output and both gradients, in fp64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    tokens, objective, rest = split(options)
    out = reference.linear_policy_loss(hidden, weight, targets, tokens, objective, **rest)
    out.loss.backward()
    return out, hidden.grad, weight.grad


def problem(tokens, vocab=37, width=24, dtype=torch.float64, vocab_size=None, seed=0, device="cpu"):
    """Return hidden, weight, targets and inputs per token, with ratios on both sides of every clip bound."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    hidden, weight = normal(tokens, width).to(dtype), (normal(vocab, width) * 2 / width**0.5).to(dtype)
    targets = torch.randint(0, vocab_size or vocab, (tokens,), generator=g)
    logp = (hidden.double() @ weight.double().t())[:, :vocab_size].log_softmax(-1).gather(1, targets[:, None])[:, 0]
    inputs = {
        "advantages": normal(tokens),
        "token_weights": normal(tokens).abs() / max(tokens, 1),
        "old_logprobs": logp + 0.5 * normal(tokens),
        "ref_logprobs": logp + 0.5 * normal(tokens),
        "tis_weights": normal(tokens).exp().clamp(max=2),
    }
    inputs = {name: value.to(device, torch.promote_types(dtype, torch.float32)) for name, value in inputs.items()}
    return hidden.to(device), weight.to(device), targets.to(device), inputs


def confident(doubt, device="cpu", vocab=33, width=8):
    """Return hidden, weight, targets and inputs of one token whose target has probability 1 - doubt."""
    weight = torch.randn(vocab, width, generator=torch.Generator().manual_seed(0))
    weight[:, 0] = 0
    weight[5] = torch.eye(width)[0]
    hidden = torch.eye(width)[:1] * torch.tensor((vocab - 1) / doubt).log()
    inputs = {"advantages": torch.ones(1, device=device), "token_weights": torch.ones(1, device=device)}
    return hidden.to(device), weight.to(device), torch.tensor([5], device=device), inputs


def run(hidden, weight, targets, **options):
    """Return the output and both gradients."""
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    out = linear_policy_loss(hidden, weight, targets, **options)
    out.loss.backward()
    return out, hidden.grad, weight.grad


def problem_of(options):
    """Return the options that change the result."""
    return {name: value for name, value in options.items() if name not in METHOD}


def relative_error(ours, exact) -> float:
    return ((ours.double() - exact).norm() / exact.norm().clamp(min=1e-300)).item()


def check(hidden, weight, targets, tolerance, grad_tolerance=None, **options):
    """Check linear_policy_loss against the definition: log-probs to 20 · tolerance, gradients to 10 · tolerance.

    The loss is checked twice: against the formula at the log-probs that were found, so only the formula's own rounding
    counts; and against the definition, where the bound grows with the derivative of the loss to the log-probs.
    Ratios, KL and clip flags are checked in fp64 only, because a rounded log-prob may cross a clip bound.
    """
    out, *grads = run(hidden, weight, targets, **options)
    definition, *exact_grads = exact(hidden, weight, targets, **problem_of(options))
    scale = options["token_weights"].double().sum().item() + 1e-300  # the loss of one token is of order 1
    at_found, _ = loss_at(out, options)
    assert abs(out.loss.item() - at_found) <= 3 * tolerance * scale
    _, sensitivity = loss_at(definition, options)
    assert abs(out.loss.item() - definition.loss.item()) <= 3 * tolerance * (scale + sensitivity)
    torch.testing.assert_close(out.logprobs.double(), definition.logprobs, rtol=0, atol=20 * tolerance)
    torch.testing.assert_close(out.entropy.double(), definition.entropy, rtol=0, atol=20 * tolerance)
    if hidden.dtype == torch.float64:
        torch.testing.assert_close(out[3:], definition[3:], rtol=1e-11, atol=1e-12)
    for ours, gradient in zip(grads, exact_grads):
        assert ours.dtype == hidden.dtype
        assert relative_error(ours, gradient) <= (grad_tolerance or 10 * tolerance)


def loss_at(out, options) -> tuple[float, float]:
    """Return the definition's loss at the log-probs and entropies of `out`, and Σ |d loss / d (log-prob, entropy)|."""
    tokens, objective, _ = split(problem_of(options))
    tokens = type(tokens)(*(x if x is None else x.double() for x in tokens))
    logprobs, entropy = (x.double().detach().requires_grad_() for x in (out.logprobs, out.entropy))
    loss = reference.loss_of_tokens(logprobs, entropy, tokens, objective).loss
    loss.backward()
    grads = (x.grad for x in (logprobs, entropy) if x.grad is not None)
    return loss.item(), sum(grad.abs().sum().item() for grad in grads)


def check_confident(doubt, **options):
    """Check that log-prob, entropy and gradients of a nearly certain token keep five digits."""
    hidden, weight, targets, inputs = confident(doubt, options.pop("device", "cpu"))
    out, *grads = run(hidden, weight, targets, **inputs, **options)
    definition, *exact_grads = exact(hidden, weight, targets, **inputs, **problem_of(options))
    torch.testing.assert_close(-definition.logprobs.item(), doubt, rtol=1e-3, atol=0)
    torch.testing.assert_close(out.logprobs.double(), definition.logprobs, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.entropy.double(), definition.entropy, rtol=1e-5, atol=0)
    for ours, gradient in zip(grads, exact_grads):
        torch.testing.assert_close(ours.double(), gradient, rtol=1e-5, atol=1e-5 * doubt)
        assert relative_error(ours, gradient) < 1e-5


def check_own(hidden, weight, targets, inputs, **options):
    """Check that log-probs found by the loss itself serve as old log-probs, and for TIS weights, with the bits of scored ones."""
    engine = inputs["old_logprobs"]

    def weigh(own, rows=slice(None)):
        return (own - engine[rows]).exp().clamp(max=1.1)

    how = {name: value for name, value in options.items() if name not in ("dual_clip", "kl_coef", "entropy_coef")}
    scored, _ = linear_logprobs(hidden, weight, targets, **how)
    given = {**inputs, "old_logprobs": scored, "tis_weights": weigh(scored)}
    own = {**inputs, "old_logprobs": None, "tis_weights": None, "own_tis_weights": weigh}
    expected, found = (run(hidden, weight, targets, **tokens, **options) for tokens in (given, own))
    assert found[0].ratio.eq(1).all() and 0 < given["tis_weights"].eq(1.1).sum() < len(engine)
    assert all(torch.equal(a, b) for a, b in zip([*found[0], *found[1:]], [*expected[0], *expected[1:]], strict=True))
    main_grad = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    run(hidden, weight, targets, **own, **options, main_grad=main_grad)
    assert torch.equal(main_grad.to(weight.dtype), expected[2])
