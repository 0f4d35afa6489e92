"""The Triton loss from logits: compiled on a GPU, otherwise in Triton's interpreter."""

from __future__ import annotations

import mmap

import pytest
import torch
from dapo_mcore.kernels.policy_loss import Objective, TokenInputs, torch_path
from dapo_mcore.kernels.policy_loss.shard import VocabShard

from tests.kernels.policy_loss.inputs import random_logits
from tests.kernels.triton_here import DEVICE, UNAVAILABLE

if UNAVAILABLE:
    pytest.skip(UNAVAILABLE, allow_module_level=True)
from dapo_mcore.kernels.policy_loss import kernel

NO_RESERVE = 0x4000  # Linux; Python names it mmap.MAP_NORESERVE from 3.13 on
pytestmark = [
    pytest.mark.usefixtures("small_blocks"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy evaluates both branches
]


@pytest.mark.parametrize("vocab", [1, 15, 31, 32, 33, 70, 128])
def test_a_narrower_gradient_fits_into_the_rows_of_the_logits(vocab):
    """The test uses fp16 because the interpreter rounds bf16 wrongly."""
    logits, targets, tokens = random_logits(4, vocab)
    arguments = targets, tokens, Objective(entropy_coef=0.1), VocabShard.of(vocab, None, None), 0.7
    _, apart = kernel.differentiate(logits.clone(), *arguments, torch.float32)
    memory = logits.clone()
    _, within = kernel.differentiate(memory, *arguments, torch.float16)
    assert within.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
    assert torch.equal(within, apart.half()) and within.shape == logits.shape


def test_rows_are_addressed_beyond_31_bits():
    """Row 2 starts at element 2^31. Only the few pages that are touched use memory."""
    if DEVICE == "cuda":
        memory = torch.empty(2**31 + 64, device=DEVICE)
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
        memory = torch.frombuffer(mmap.mmap(-1, 4 * (2**31 + 64), flags=flags), dtype=torch.float32)
    values, targets, tokens = random_logits(3, 40)
    far = memory.as_strided((3, 40), (2**30, 1))
    far.copy_(values)
    arguments = targets, tokens, Objective(), VocabShard.of(40, None, None), 1.0, torch.float32
    losses, grad = kernel.differentiate(far, *arguments)
    near, near_grad = kernel.differentiate(values, *arguments)
    assert torch.equal(losses.logprobs, near.logprobs) and torch.equal(grad, near_grad)


def test_the_results_equal_those_of_the_torch_path_to_rounding():
    logits, targets, tokens = random_logits(12)
    objective = Objective(0.1, 0.3, 1.5, 0.2, "k3", 0.05)
    arguments = targets, tokens, objective, VocabShard.of(70, 66, None), 1.3, torch.float32
    ours, grad = kernel.differentiate(logits.clone(), *[a % 66 if a is targets else a for a in arguments])
    exact, exact_grad = torch_path.differentiate(
        logits.double(), targets % 66, TokenInputs(*(x.double() for x in tokens)), *arguments[2:5], torch.float64
    )
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-4, atol=1e-6)
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a.to(b.dtype), b, rtol=2e-5, atol=1e-5)
