"""The policy head, chunk by chunk in PyTorch, against its definition in fp64."""

from __future__ import annotations

import pytest
import torch
from dapo_mcore.kernels.policy_head import chunk_tokens_for, linear_logprobs
from dapo_mcore.kernels.policy_head.chunks import _Gradients
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.keywords import linear_policy_loss
from tests.kernels.live_bytes import LiveBytes
from tests.kernels.policy_head.exact import EVERYTHING, check, check_confident, check_own, problem, relative_error, run


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
    """Most RL tokens are nearly certain: at 1 - p = 1e-9 fp32 rounds p to 1, but 1 - p must keep its digits."""
    check_confident(doubt, entropy_coef=entropy_coef)


@pytest.mark.parametrize("old", [-1e4, 1e4])
def test_extreme_old_logprobs_give_no_gradient(old):
    hidden, weight, targets, inputs = problem(9, dtype=torch.float32)
    out, *grads = run(hidden, weight, targets, advantages=inputs["advantages"],
                      token_weights=inputs["token_weights"], old_logprobs=torch.full((9,), old))  # fmt: skip
    assert out.loss.isfinite() and all(grad.eq(0).all() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_finds_old_log_probs_and_tis_weights_itself(dtype):
    check_own(*problem(63, dtype=dtype), chunk_tokens=40, **EVERYTHING)


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
    """Count the elements of the largest tensor that any operation returned, and the matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
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
        ({"advantages": torch.zeros(3)}, r"advantages has shape \[3\], but there are 4 tokens"),
        ({"vocab_size": 7}, "vocab_size 7 must be between 1 and the 6 rows"),
        ({"temperature": 0.0}, "temperature 0.0 must be above 0"),
        ({"chunk_tokens": 0}, "chunk_tokens 0 must be at least 1"),
    ],
)
def test_wrong_arguments_raise_errors_that_explain(changes, message):
    arguments = {
        "hidden": torch.zeros(4, 2),
        "weight": torch.zeros(6, 2),
        "targets": torch.zeros(4, dtype=torch.int64),
        "advantages": torch.zeros(4),
        "token_weights": torch.zeros(4),
    } | changes
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(**arguments)


@pytest.mark.parametrize(
    ("budget", "vocab", "dtype", "rows"),
    [
        (4 << 30, 152_064, torch.float32, 7040),
        (4 << 30, 152_064, torch.bfloat16, 14_080),
        (1, 19_008, torch.float32, 128),
    ],
)
def test_chunk_size_from_a_byte_budget(budget, vocab, dtype, rows):
    assert chunk_tokens_for(budget, vocab, dtype) == rows
    assert rows == 128 or rows * vocab * dtype.itemsize <= budget < (rows + 128) * vocab * dtype.itemsize


def test_logits_dtype_is_that_of_hidden_or_fp32():
    hidden, weight, targets, inputs = problem(4, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"logits_dtype torch.bfloat16 must be None, torch.float32 or .*torch.float32"):
        linear_policy_loss(hidden, weight, targets, **inputs, logits_dtype=torch.bfloat16)


@pytest.mark.parametrize(("dtype", "peak", "final"), [(torch.float32, 1, 1), (torch.bfloat16, 2.5, 0.5)])
def test_autograd_mode_holds_one_gradient_to_weight_and_the_backward_pass_makes_no_other(dtype, peak, final):
    """Bytes in units of that gradient [V, H] in fp32, 80 times the logits of a chunk. A CPU also makes the weight fp32."""
    hidden, weight, targets, inputs = problem(32, vocab=512, width=320, dtype=dtype)
    unit, leaf = 4 * weight.numel(), weight.requires_grad_()
    with LiveBytes() as live:
        loss = linear_policy_loss(hidden, weight, targets, chunk_tokens=4, **inputs).loss
        in_forward, live.peak, kept = live.peak, live.now, live.now
        loss.backward()
    found = [num_bytes / unit for num_bytes in (in_forward, kept, live.peak, live.now)]
    assert found == pytest.approx([peak, final, final, final], abs=0.1) and leaf.grad.dtype == dtype


def test_the_gradient_of_one_chunk_to_a_bf16_weight_is_never_wider():
    """On a GPU, whose products take bf16: called as `linear_policy_loss` does there. A CPU has no product that widens."""
    hidden, weight = torch.randn(4, 8).bfloat16(), torch.randn(512, 8).bfloat16().requires_grad_()
    grad_logits = torch.randn(4, 512).bfloat16()
    grads = _Gradients(hidden, weight, None, None, one_chunk=True)
    with LiveBytes() as live, torch.no_grad():
        grads.add(grad_logits, hidden, weight, slice(0, 4))
    assert live.now == live.peak == 2 * weight.numel()
    expected = (grad_logits.float().t() @ hidden.float()).bfloat16()
    torch.testing.assert_close(grads.weight, expected, rtol=2.0**-7, atol=1e-6)
    assert _Gradients(hidden, weight, None, None, one_chunk=False).weight_dtype == torch.float32
