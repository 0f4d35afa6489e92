"""The policy head against fp64 autograd of log_softmax over the whole [T, V]."""

from __future__ import annotations

import math

import pytest
import torch
from dapo_mcore.kernels.policy_head import linear_logprobs, linear_policy_loss
from torch.utils._python_dispatch import TorchDispatchMode

EVERYTHING = {"dual_clip": 1.5, "kl_coef": 0.1, "entropy_coef": 0.02, "temperature": 0.7}


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


def problem(tokens, vocab=37, width=24, dtype=torch.float64, vocab_size=None, seed=0):
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
    inputs = {name: value.to(torch.promote_types(dtype, torch.float32)) for name, value in inputs.items()}
    return hidden, weight, targets, inputs


def run(hidden, weight, targets, **options):
    """The output and both gradients."""
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    out = linear_policy_loss(hidden, weight, targets, **options)
    out.loss.backward()
    return out, hidden.grad, weight.grad


def relative_error(ours, exact) -> float:
    return ((ours.double() - exact).norm() / exact.norm().clamp(min=1e-300)).item()


def check(hidden, weight, targets, tolerance, grad_tolerance=None, **options):
    out, *grads = run(hidden, weight, targets, **options)
    loss, logp, entropy, *exact = plain(
        hidden, weight, targets, **{k: v for k, v in options.items() if k != "chunk_tokens"}
    )
    scale = options["token_weights"].double().sum().item() + 1e-300  # losses of single tokens are of order 1
    assert abs(out.loss.item() - loss.item()) <= 3 * tolerance * scale
    torch.testing.assert_close(out.logprobs.double(), logp, rtol=0, atol=20 * tolerance)
    torch.testing.assert_close(out.entropy.double(), entropy, rtol=0, atol=20 * tolerance)
    for ours, reference in zip(grads, exact):
        assert ours.dtype == hidden.dtype
        assert relative_error(ours, reference) <= (grad_tolerance or 10 * tolerance)


@pytest.mark.parametrize("tokens", [0, 1, 63, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_everything_at_once_on_ragged_sizes(tokens, dtype, tolerance):
    hidden, weight, targets, inputs = problem(tokens, dtype=dtype)
    check(hidden, weight, targets, tolerance, chunk_tokens=100, **inputs, **EVERYTHING)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators(estimator):
    check(*problem(50)[:3], 1e-12, **problem(50)[3], kl_coef=0.3, kl_estimator=estimator)


@pytest.mark.parametrize(
    "options",
    [{}, {"dual_clip": 1.2}, {"entropy_coef": 0.5}, {"temperature": 1.7}, {"clip_low": 0.0, "clip_high": 0.1}],
    ids=str,
)
def test_single_options(options):
    hidden, weight, targets, inputs = problem(80)
    del inputs["ref_logprobs"], inputs["tis_weights"]
    check(hidden, weight, targets, 1e-12, **inputs, **options)


def test_bf16_inputs_are_computed_in_fp32():
    hidden, weight, targets, inputs = problem(63, dtype=torch.bfloat16)
    check(hidden, weight, targets, 1e-6, grad_tolerance=4e-3, **inputs, **EVERYTHING)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padded_columns_have_no_probability_and_no_gradient(dtype):
    hidden, weight, targets, inputs = problem(63, vocab=40, vocab_size=29, dtype=dtype)
    weight[29:] *= 100  # would win every softmax
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    check(hidden, weight, targets, tolerance, vocab_size=29, **inputs, **EVERYTHING)
    _, _, grad = run(hidden, weight, targets, vocab_size=29, **inputs, **EVERYTHING)
    assert grad[29:].eq(0).all() and grad[:29].ne(0).all()


def test_all_negative_logits():
    hidden, weight, targets, inputs = problem(63, dtype=torch.float32)
    hidden, weight = hidden.abs() * 10, -weight.abs()
    assert (hidden @ weight.t()).max() < -1
    del inputs["old_logprobs"], inputs["ref_logprobs"]
    check(hidden, weight, targets, 2e-5, **inputs, entropy_coef=0.02, temperature=0.7)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize("doubt", [1e-3, 1e-5, 1e-7, 1e-8, 1e-9])
def test_confident_tokens_keep_their_gradient(doubt, entropy_coef):
    """Most RL tokens are nearly certain: at 1 - p = 1e-9 fp32 holds p = 1, yet 1 - p must keep its digits."""
    vocab, width = 33, 8
    weight = torch.randn(vocab, width, generator=torch.Generator().manual_seed(0))
    weight[:, 0] = 0
    weight[5] = torch.eye(width)[0]
    hidden = torch.eye(width)[:1] * math.log((vocab - 1) / doubt)
    inputs = {"advantages": torch.ones(1), "token_weights": torch.ones(1), "entropy_coef": entropy_coef}
    targets = torch.tensor([5])
    out, *grads = run(hidden, weight, targets, **inputs)
    _, logp, entropy, *exact = plain(hidden, weight, targets, **inputs)
    assert -logp.item() == pytest.approx(doubt, rel=1e-3)
    assert out.logprobs.item() == pytest.approx(logp.item(), rel=1e-5)
    assert out.entropy.item() == pytest.approx(entropy.item(), rel=1e-5)
    for ours, reference in zip(grads, exact):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=1e-5 * doubt)
        assert relative_error(ours, reference) < 1e-5


@pytest.mark.parametrize("old", [-1e4, 1e4])
def test_extreme_old_logprobs_give_no_gradient(old):
    hidden, weight, targets, inputs = problem(9, dtype=torch.float32)
    out, *grads = run(hidden, weight, targets, advantages=inputs["advantages"],
                      token_weights=inputs["token_weights"], old_logprobs=torch.full((9,), old))  # fmt: skip
    assert out.loss.isfinite() and all(grad.eq(0).all() for grad in grads)


def test_without_old_logprobs_it_is_supervised_cross_entropy():
    hidden, weight, targets, _ = problem(63)
    weights = torch.full((63,), 1 / 63, dtype=torch.float64)
    out, *grads = run(hidden, weight, targets, advantages=torch.ones(63), token_weights=weights)
    hidden.requires_grad_(), weight.requires_grad_()
    torch.nn.functional.cross_entropy(hidden @ weight.t(), targets).backward()
    assert out.ratio.eq(1).all() and out.loss.item() == pytest.approx(-1)
    assert relative_error(grads[0], hidden.grad) < 1e-13 and relative_error(grads[1], weight.grad) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring_pass_has_the_bits_of_the_training_pass(dtype):
    hidden, weight, targets, inputs = problem(1000, dtype=dtype)
    options = {"temperature": 0.9, "vocab_size": 37, "chunk_tokens": 300}
    old, entropy = linear_logprobs(hidden, weight, targets, **options)
    out, *_ = run(hidden, weight, targets, **inputs | {"old_logprobs": old}, **options)
    assert old.dtype == torch.float32 and not old.requires_grad
    assert torch.equal(old, out.logprobs) and torch.equal(entropy, out.entropy)
    assert out.ratio.eq(1).all()


def test_chunking_changes_rounding_only():
    hidden, weight, targets, inputs = problem(130)
    whole, *grads = run(hidden, weight, targets, **inputs, **EVERYTHING)
    for chunk_tokens in (1, 7, 64, 130):
        out, *others = run(hidden, weight, targets, chunk_tokens=chunk_tokens, **inputs, **EVERYTHING)
        for ours, reference in zip([*out, *others], [*whole, *grads]):
            torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-13)


def test_repeats_bit_by_bit():
    hidden, weight, targets, inputs = problem(500, dtype=torch.float32)
    (first, *grads), (second, *again) = (run(hidden, weight, targets, **inputs, **EVERYTHING) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip([*first, *grads], [*second, *again]))


def test_backward_scales_and_only_wanted_gradients_are_made():
    hidden, weight, targets, inputs = problem(20)
    _, grad, _ = run(hidden, weight, targets, **inputs)
    hidden.requires_grad_()
    out = linear_policy_loss(hidden, weight, targets, **inputs)
    (-4 * out.loss).backward()
    torch.testing.assert_close(hidden.grad, -4 * grad, rtol=1e-14, atol=0)
    assert weight.grad is None and not any(field.requires_grad for field in out[1:])
    with torch.no_grad():
        assert not linear_policy_loss(hidden, weight, targets, **inputs).loss.requires_grad


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned, and the matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        return result


def test_memory_is_a_chunk_and_work_is_three_products():
    tokens, vocab, chunk = 320, 96, 32
    hidden, weight, targets, inputs = problem(tokens, vocab=vocab, width=16, dtype=torch.float32)
    with Largest() as seen:
        run(hidden, weight, targets, chunk_tokens=chunk, **inputs, **EVERYTHING)
    assert seen.elements <= max(chunk * vocab, vocab * 16, tokens * 16)
    assert seen.products == 3 * tokens / chunk
    with Largest() as seen:
        linear_logprobs(hidden, weight, targets, chunk_tokens=chunk)
    assert seen.elements <= max(chunk * vocab, tokens * 16) and seen.products == tokens / chunk


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(4, 3)}, r"same H .* got \[4, 3\] and \[6, 2\]"),
        ({"hidden": torch.zeros(4, 2).double()}, "got torch.float64 and torch.float32"),
        ({"hidden": torch.zeros(4, 2, device="meta")}, "hidden is on meta, but weight on cpu"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, r"targets must be int64 \[4\].* \[5\]"),
        ({"targets": torch.zeros(4, dtype=torch.int32)}, "got torch.int32"),
        ({"targets": torch.tensor([0, 1, 5, 3]), "vocab_size": 5}, "0 … 4, the vocabulary, but span 0 … 5"),
        ({"advantages": torch.zeros(3)}, r"advantages has shape \[3\], but there are 4 tokens"),
        ({"vocab_size": 7}, "vocab_size 7 must be between 1 and the 6 rows"),
        ({"temperature": 0.0}, "temperature 0.0 must be above 0"),
        ({"chunk_tokens": 0}, "chunk_tokens 0 must be at least 1"),
    ],
)
def test_wrong_arguments_are_told_what_is_wrong(changes, message):
    arguments = {
        "hidden": torch.zeros(4, 2),
        "weight": torch.zeros(6, 2),
        "targets": torch.zeros(4, dtype=torch.int64),
        "advantages": torch.zeros(4),
        "token_weights": torch.zeros(4),
    } | changes
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(**arguments)
