"""Policy head problems, and their solution by fp64 autograd of log_softmax over the whole [T, V].

Change here: what the tests of the policy head compare with.
"""

from __future__ import annotations

import torch
from dapo_mcore.kernels.policy_head import linear_policy_loss

EVERYTHING = {"dual_clip": 1.5, "kl_coef": 0.1, "entropy_coef": 0.02, "temperature": 0.7}
# options that say how to compute and leave the result alone
MEANS = ("chunk_tokens", "logits_dtype", "implementation", "main_grad", "grad_scale")


def plain(hidden, weight, targets, *, advantages, token_weights, old_logprobs=None, ref_logprobs=None, tis_weights=None,
          clip_low=0.2, clip_high=0.28, dual_clip=None, kl_coef=0.0, kl_estimator="k3", entropy_coef=0.0,
          temperature=1.0, vocab_size=None):  # fmt: skip
    """Loss, log-probs, entropy and both gradients in fp64, written as in the papers, from the [T, V] logits."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    a, w = advantages.double(), token_weights.double()
    everywhere = ((hidden @ weight.t())[:, :vocab_size] / temperature).log_softmax(-1)
    logp = everywhere.gather(1, targets[:, None])[:, 0]
    entropy = -(everywhere.exp() * everywhere).sum(-1)
    r = (logp - (logp.detach() if old_logprobs is None else old_logprobs.double())).clamp(-20, 20).exp()
    loss = torch.maximum(-a * r, -a * r.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is not None:
        loss = torch.where(a < 0, torch.minimum(-a * dual_clip, loss), loss)
    if tis_weights is not None:
        loss = loss * tis_weights
    if ref_logprobs is not None:
        x = logp - ref_logprobs.double()
        loss = loss + kl_coef * {"k1": x, "k2": x**2 / 2, "k3": (-x).exp() - 1 + x}[kl_estimator]
    total = (w * (loss - entropy_coef * entropy)).sum()
    total.backward()
    return total.detach(), logp.detach(), entropy.detach(), hidden.grad, weight.grad


def problem(tokens, vocab=37, width=24, dtype=torch.float64, vocab_size=None, seed=0, device="cpu"):
    """hidden, weight, targets and per-token inputs, with ratios on both sides of every clip."""
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
    """One token whose target has probability 1 - doubt: hidden, weight, targets, inputs."""
    weight = torch.randn(vocab, width, generator=torch.Generator().manual_seed(0))
    weight[:, 0] = 0
    weight[5] = torch.eye(width)[0]
    hidden = torch.eye(width)[:1] * torch.tensor((vocab - 1) / doubt).log()
    inputs = {"advantages": torch.ones(1, device=device), "token_weights": torch.ones(1, device=device)}
    return hidden.to(device), weight.to(device), torch.tensor([5], device=device), inputs


def run(hidden, weight, targets, **options):
    """The output and both gradients."""
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    out = linear_policy_loss(hidden, weight, targets, **options)
    out.loss.backward()
    return out, hidden.grad, weight.grad


def relative_error(ours, exact) -> float:
    return ((ours.double() - exact).norm() / exact.norm().clamp(min=1e-300)).item()


def check(hidden, weight, targets, tolerance, grad_tolerance=None, **options):
    """Asserts outputs and gradients of linear_policy_loss: log-probs to 20 · tolerance, gradients to 10 · tolerance."""
    out, *grads = run(hidden, weight, targets, **options)
    problem = {name: value for name, value in options.items() if name not in MEANS}
    loss, logp, entropy, *exact = plain(hidden, weight, targets, **problem)
    scale = options["token_weights"].double().sum().item() + 1e-300  # losses of single tokens are of order 1
    assert abs(out.loss.item() - loss.item()) <= 3 * tolerance * scale
    torch.testing.assert_close(out.logprobs.double(), logp, rtol=0, atol=20 * tolerance)
    torch.testing.assert_close(out.entropy.double(), entropy, rtol=0, atol=20 * tolerance)
    for ours, reference in zip(grads, exact):
        assert ours.dtype == hidden.dtype
        assert relative_error(ours, reference) <= (grad_tolerance or 10 * tolerance)


def check_confident(doubt, **options):
    """Asserts that log-prob, entropy and gradients of a nearly certain token keep five digits."""
    hidden, weight, targets, inputs = confident(doubt, options.pop("device", "cpu"))
    out, *grads = run(hidden, weight, targets, **inputs, **options)
    problem = {name: value for name, value in options.items() if name not in MEANS}
    _, logp, entropy, *exact = plain(hidden, weight, targets, **inputs, **problem)
    torch.testing.assert_close(-logp.item(), doubt, rtol=1e-3, atol=0)
    torch.testing.assert_close(out.logprobs.double(), logp, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.entropy.double(), entropy, rtol=1e-5, atol=0)
    for ours, reference in zip(grads, exact):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=1e-5 * doubt)
        assert relative_error(ours, reference) < 1e-5
