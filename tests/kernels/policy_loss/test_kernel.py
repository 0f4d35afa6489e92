"""The Triton loss from log-probs and from logits: compiled on a GPU, otherwise in Triton's interpreter."""

from __future__ import annotations

import mmap

import pytest
import torch
from dapo_mcore.kernels.policy_loss import Objective, TokenInputs, torch_path
from dapo_mcore.kernels.policy_loss.shard import VocabShard

from tests.kernels.keywords import policy_loss, policy_loss_from_logits
from tests.kernels.triton_here import DEVICE, UNAVAILABLE

if UNAVAILABLE:
    pytest.skip(UNAVAILABLE, allow_module_level=True)
from dapo_mcore.kernels.policy_loss import kernel

NO_RESERVE = 0x4000  # Linux; Python names it mmap.MAP_NORESERVE from 3.13 on
FIELDS = ("loss", "ratio", "clipped_low", "clipped_high", "clipped_dual", "kl")
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy evaluates both branches


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Give the small inputs of these tests several blocks, the last one partial."""
    monkeypatch.setattr(kernel, "SUM_BLOCK", 16)
    monkeypatch.setattr(kernel, "GRADIENT_BLOCK", 32)
    monkeypatch.setattr(kernel, "BLOCK_TOKENS", 32)


def random_inputs(num: int, seed: int = 0) -> tuple[torch.Tensor, TokenInputs]:
    g = torch.Generator().manual_seed(seed)
    normal = lambda: torch.randn(num, generator=g)  # noqa: E731
    logprobs = -normal().abs()
    tokens = TokenInputs(normal(), normal().abs(), logprobs + normal(), logprobs + normal(), normal().exp())
    return logprobs.to(DEVICE), TokenInputs(*(x.to(DEVICE) for x in tokens))


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


def test_without_old_logprobs_the_ratio_is_exactly_one():
    logprobs, tokens = random_inputs(63)
    terms = kernel.token_losses(logprobs, TokenInputs(tokens.advantages, tokens.token_weights), Objective())
    assert terms.ratio.eq(1).all() and terms.kl.eq(0).all()
    assert torch.equal(terms.grad_logprobs, tokens.token_weights * -tokens.advantages)


@pytest.mark.parametrize("old", [-1e4, 1e4])
def test_no_gradient_and_no_overflow_outside_the_clamps(old):
    logprobs, tokens = random_inputs(20)
    far = torch.full_like(logprobs, old)
    tokens = tokens._replace(old_logprobs=far, ref_logprobs=far)
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


def logits_problem(num_tokens=12, vocab=70, **kind):
    g = torch.Generator().manual_seed(1)
    logits = (torch.randn(num_tokens, vocab, generator=g) * 3).to(DEVICE, **kind)
    return logits, torch.randint(0, vocab, (num_tokens,), generator=g).to(DEVICE), random_inputs(num_tokens)[1]


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_columns_of_minus_infinity_have_no_probability_and_no_gradient(entropy_coef):
    logits, targets, tokens = logits_problem()
    targets %= 35
    logits[:, 40:60] = -torch.inf
    logits.requires_grad_()
    options = {**tokens._asdict(), "entropy_coef": entropy_coef}
    out = policy_loss_from_logits(logits, targets, **options, implementation="triton")
    out.loss.backward()
    kept = torch.cat([logits[:, :40], logits[:, 60:]], 1).detach().double().requires_grad_()
    exact = policy_loss_from_logits(kept, targets, **options)
    exact.loss.backward()
    assert logits.grad[:, 40:60].eq(0).all()
    torch.testing.assert_close(out.entropy.double(), exact.entropy, rtol=1e-5, atol=1e-6)
    grad = torch.cat([logits.grad[:, :40], logits.grad[:, 60:]], 1)
    torch.testing.assert_close(grad.double(), kept.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("vocab", [1, 15, 31, 32, 33, 70, 128])
def test_a_narrower_gradient_fits_into_the_rows_of_the_logits(vocab):
    """Uses fp16 in place of bf16, which the interpreter rounds wrongly."""
    logits, targets, tokens = logits_problem(4, vocab)
    arguments = targets, tokens, Objective(entropy_coef=0.1), VocabShard.of(vocab, None, None), 0.7
    _, apart = kernel.differentiate(logits.clone(), *arguments, torch.float32)
    memory = logits.clone()
    _, within = kernel.differentiate(memory, *arguments, torch.float16)
    assert within.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
    assert torch.equal(within, apart.half()) and within.shape == logits.shape


def test_a_target_outside_the_vocabulary_has_no_probability():
    logits, targets, tokens = logits_problem(3)
    targets[:] = torch.tensor([-1, 70, 10**9])
    shard = VocabShard.of(70, None, None)
    losses, grad = kernel.differentiate(logits, targets, tokens, Objective(), shard, 1.0, torch.float32)
    assert losses.logprobs.eq(-torch.inf).all() and losses.entropy.isfinite().all() and grad.isfinite().all()


def test_rows_are_addressed_beyond_31_bits():
    """Row 2 starts at element 2^31. Only the few pages that are touched use memory."""
    if DEVICE == "cuda":
        memory = torch.empty(2**31 + 64, device=DEVICE)
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
        memory = torch.frombuffer(mmap.mmap(-1, 4 * (2**31 + 64), flags=flags), dtype=torch.float32)
    values, targets, tokens = logits_problem(3, 40)
    far = memory.as_strided((3, 40), (2**30, 1))
    far.copy_(values)
    arguments = targets, tokens, Objective(), VocabShard.of(40, None, None), 1.0, torch.float32
    losses, grad = kernel.differentiate(far, *arguments)
    near, near_grad = kernel.differentiate(values, *arguments)
    assert torch.equal(losses.logprobs, near.logprobs) and torch.equal(grad, near_grad)


def test_the_results_equal_those_of_the_torch_path_to_rounding():
    logits, targets, tokens = logits_problem(12)
    objective = Objective(0.1, 0.3, 1.5, 0.2, "k3", 0.05)
    arguments = targets, tokens, objective, VocabShard.of(70, 66, None), 1.3, torch.float32
    ours, grad = kernel.differentiate(logits.clone(), *[a % 66 if a is targets else a for a in arguments])
    exact, exact_grad = torch_path.differentiate(
        logits.double(), targets % 66, TokenInputs(*(x.double() for x in tokens)), *arguments[2:5], torch.float64
    )
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-4, atol=1e-6)
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a.to(b.dtype), b, rtol=2e-5, atol=1e-5)
