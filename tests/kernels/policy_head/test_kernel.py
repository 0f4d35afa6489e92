"""The policy head in Triton against fp64: compiled on a GPU, otherwise in Triton's interpreter.

The interpreter does not show races between threads, bf16 rounding or the GPU's approximate exponential.
"""

from __future__ import annotations

import pytest
import torch
from dapo_mcore.kernels.policy_head import linear_logprobs

from tests.kernels.keywords import linear_policy_loss
from tests.kernels.policy_head.exact import EVERYTHING, check, check_confident, check_own, problem, run
from tests.kernels.triton_here import DEVICE, UNAVAILABLE

if UNAVAILABLE:
    pytest.skip(UNAVAILABLE, allow_module_level=True)
from dapo_mcore.kernels.policy_loss import kernel

TRITON = {"implementation": "triton"}
FP32 = {"dtype": torch.float32, "device": DEVICE}
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy evaluates both branches


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Give the small vocabularies of these tests several blocks, the last one partial (the interpreter takes 30 ms per row)."""
    monkeypatch.setattr(kernel, "SUM_BLOCK", 16)
    monkeypatch.setattr(kernel, "GRADIENT_BLOCK", 32)
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("tokens", [0, 1, 63])
def test_everything_at_once_on_ragged_sizes(tokens):
    hidden, weight, targets, inputs = problem(tokens, vocab=101, **FP32)
    check(hidden, weight, targets, 1e-6, chunk_tokens=50, **inputs, **EVERYTHING, **TRITON)


def test_more_tokens_than_multiprocessors_in_uneven_chunks():
    """Every row is a program of its own, so the interpreter, which runs one after the other, needs fewer of them."""
    tokens, chunk = (1000, 384) if DEVICE == "cuda" else (200, 77)
    hidden, weight, targets, inputs = problem(tokens, vocab=13, **FP32)
    del inputs["ref_logprobs"], inputs["tis_weights"]
    check(hidden, weight, targets, 1e-6, chunk_tokens=chunk, **inputs, **TRITON)


@pytest.mark.parametrize("vocab", [1, 16, 33, 64])
def test_vocabularies_of_one_block_and_less(vocab):
    hidden, weight, targets, inputs = problem(9, vocab=vocab, width=7, **FP32)
    check(hidden, weight, targets, 1e-6, **inputs, **EVERYTHING, **TRITON)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators(estimator):
    hidden, weight, targets, inputs = problem(12, **FP32)
    check(hidden, weight, targets, 1e-6, **inputs, kl_coef=0.3, kl_estimator=estimator, **TRITON)


@pytest.mark.parametrize(
    "options",
    [{}, {"dual_clip": 1.2}, {"entropy_coef": 0.5}, {"temperature": 1.7}, {"clip_low": 0.0, "clip_high": 0.1}],
    ids=str,
)
def test_single_options(options):
    hidden, weight, targets, inputs = problem(12, **FP32)
    del inputs["ref_logprobs"], inputs["tis_weights"]
    check(hidden, weight, targets, 1e-6, **inputs, **options, **TRITON)


def test_padded_columns_have_no_probability_and_no_gradient():
    hidden, weight, targets, inputs = problem(12, vocab=70, vocab_size=29, **FP32)
    weight[29:] *= 100  # would win every softmax
    check(hidden, weight, targets, 1e-6, vocab_size=29, **inputs, **EVERYTHING, **TRITON)
    _, _, grad = run(hidden, weight, targets, vocab_size=29, **inputs, **EVERYTHING, **TRITON)
    assert grad[29:].eq(0).all() and grad[:29].ne(0).all()


def test_all_negative_logits():
    hidden, weight, targets, inputs = problem(12, **FP32)
    hidden, weight = hidden.abs() * 10, -weight.abs()
    del inputs["old_logprobs"], inputs["ref_logprobs"]
    check(hidden, weight, targets, 2e-5, **inputs, entropy_coef=0.02, temperature=0.7, **TRITON)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize("doubt", [1e-3, 1e-5, 1e-7, 1e-8, 1e-9])
def test_confident_tokens_keep_their_gradient(doubt, entropy_coef):
    check_confident(doubt, entropy_coef=entropy_coef, device=DEVICE, **TRITON)


@pytest.mark.parametrize("old", [-1e4, 1e4])
def test_extreme_old_logprobs_give_no_gradient(old):
    hidden, weight, targets, inputs = problem(9, **FP32)
    inputs = {"advantages": inputs["advantages"], "token_weights": inputs["token_weights"]}
    inputs["old_logprobs"] = torch.full_like(inputs["advantages"], old)
    out, *grads = run(hidden, weight, targets, **inputs, **TRITON)
    assert out.loss.isfinite() and all(grad.eq(0).all() for grad in grads)


def test_an_empty_mask_gives_zero_loss_and_gradients():
    hidden, weight, targets, inputs = problem(9, **FP32)
    inputs["token_weights"].zero_()
    out, *grads = run(hidden, weight, targets, **inputs, **EVERYTHING, **TRITON)
    assert out.loss == 0 and all(grad.eq(0).all() for grad in grads)
    assert out.logprobs.lt(0).all()


def test_masked_rows_give_no_gradient_and_the_others_the_same():
    hidden, weight, targets, inputs = problem(12, **FP32)
    inputs["token_weights"][::2] = 0
    _, grad, _ = run(hidden, weight, targets, **inputs, **TRITON)
    _, alone, _ = run(hidden[1::2], weight, targets[1::2], **{k: v[1::2] for k, v in inputs.items()}, **TRITON)
    assert grad[::2].eq(0).all() and grad[1::2].ne(0).any()
    torch.testing.assert_close(grad[1::2], alone, rtol=1e-6, atol=1e-9)


def test_a_nan_in_a_hidden_state_reaches_the_loss():
    hidden, weight, targets, inputs = problem(4, **FP32)
    hidden[2, 3] = float("nan")
    out, grad, _ = run(hidden, weight, targets, **inputs, **EVERYTHING, **TRITON)
    assert out.loss.isnan() and out.logprobs.isnan().tolist() == [False, False, True, False] and grad[2].isnan().all()


def test_flags_and_ratio_equal_those_of_the_torch_path():
    hidden, weight, targets, inputs = problem(40, **FP32)
    ours, *_ = run(hidden, weight, targets, **inputs, **EVERYTHING, **TRITON)
    theirs, *_ = run(hidden, weight, targets, **inputs, **EVERYTHING, implementation="torch")
    for flag in ("clipped_low", "clipped_high", "clipped_dual"):
        assert getattr(ours, flag).any() and torch.equal(getattr(ours, flag), getattr(theirs, flag))
    torch.testing.assert_close(ours.ratio, theirs.ratio, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.kl, theirs.kl, rtol=1e-4, atol=1e-7)


def test_scratch_memory_full_of_nan_changes_nothing():
    hidden, weight, targets, inputs = problem(12, vocab=50, vocab_size=41, **FP32)
    options = {**inputs, **EVERYTHING, **TRITON, "vocab_size": 41, "chunk_tokens": 8}
    clean, *grads = run(hidden, weight, targets, **options)
    torch.use_deterministic_algorithms(True)  # fills the result of torch.empty with nan
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        again, *others = run(hidden, weight, targets, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip([*clean, *grads], [*again, *others]))


@pytest.mark.parametrize("vocab_size", [None, 29])
def test_scoring_pass_has_the_bits_of_the_training_pass(vocab_size):
    hidden, weight, targets, inputs = problem(20, vocab_size=vocab_size, **FP32)
    options = {"temperature": 0.9, "vocab_size": vocab_size, "chunk_tokens": 12, **TRITON}
    old, entropy = linear_logprobs(hidden, weight, targets, **options)
    out, *_ = run(hidden, weight, targets, **inputs | {"old_logprobs": old}, **options)
    assert torch.equal(old, out.logprobs) and torch.equal(entropy, out.entropy) and out.ratio.eq(1).all()
    with torch.no_grad():
        silent = linear_policy_loss(hidden, weight, targets, **inputs, **options)
    assert torch.equal(silent.logprobs, old) and not silent.loss.requires_grad


def test_the_loss_finds_old_log_probs_and_tis_weights_itself():
    check_own(*problem(9, **FP32), chunk_tokens=6, **EVERYTHING, **TRITON)


def test_chunking_changes_rounding_only():
    hidden, weight, targets, inputs = problem(12, **FP32)
    whole, *grads = run(hidden, weight, targets, **inputs, **EVERYTHING, **TRITON)
    for chunk_tokens in (1, 7, 8):
        out, *others = run(hidden, weight, targets, chunk_tokens=chunk_tokens, **inputs, **EVERYTHING, **TRITON)
        for ours, expected in zip([*out, *others], [*whole, *grads]):
            torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-6)


def test_repeats_bit_by_bit():
    hidden, weight, targets, inputs = problem(12, **FP32)
    (first, *grads), (second, *again) = (run(hidden, weight, targets, **inputs, **EVERYTHING, **TRITON) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip([*first, *grads], [*second, *again]))


@pytest.mark.parametrize("logits_dtype", [None, torch.bfloat16])
def test_bf16_inputs(logits_dtype):
    """On a GPU bf16 products have an fp32 result; on the CPU all is fp32. bf16 logits cost two digits."""
    hidden, weight, targets, inputs = problem(16, dtype=torch.bfloat16, device=DEVICE)
    tolerance = (3e-6, 1e-2) if logits_dtype is None else (2e-3, 5e-2)
    del inputs["old_logprobs"], inputs["ref_logprobs"]  # a rounded logit may cross a clip bound
    check(hidden, weight, targets, *tolerance, **inputs, temperature=0.7, logits_dtype=logits_dtype, **TRITON)
