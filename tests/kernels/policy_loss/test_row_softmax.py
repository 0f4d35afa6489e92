"""The Triton softmax of a row: logits and targets at the edge of what is allowed."""

from __future__ import annotations

import pytest
import torch
from dapo_mcore.kernels.policy_loss import Objective
from dapo_mcore.kernels.policy_loss.shard import VocabShard

from tests.kernels.keywords import policy_loss_from_logits
from tests.kernels.policy_loss.inputs import random_logits
from tests.kernels.triton_here import UNAVAILABLE

if UNAVAILABLE:
    pytest.skip(UNAVAILABLE, allow_module_level=True)
from dapo_mcore.kernels.policy_loss import kernel

pytestmark = [
    pytest.mark.usefixtures("small_blocks"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy evaluates both branches
]


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_columns_of_minus_infinity_have_no_probability_and_no_gradient(entropy_coef):
    logits, targets, tokens = random_logits()
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


def test_a_target_outside_the_vocabulary_has_no_probability():
    logits, targets, tokens = random_logits(3)
    targets[:] = torch.tensor([-1, 70, 10**9])
    shard = VocabShard.of(70, None, None)
    losses, grad = kernel.differentiate(logits, targets, tokens, Objective(), shard, 1.0, torch.float32)
    assert losses.logprobs.eq(-torch.inf).all() and losses.entropy.isfinite().all() and grad.isfinite().all()
