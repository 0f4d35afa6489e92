"""The loss from logits against autograd in fp64, for both implementations, in place and not in place."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.keywords import policy_loss, policy_loss_from_logits
from tests.kernels.triton_here import DEVICE, IMPLEMENTATIONS, UNAVAILABLE

OPTIONS = {"dual_clip": 1.5, "kl_coef": 0.1, "entropy_coef": 0.05}
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def problem(num_tokens=12, vocab=37, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    normal = lambda *shape: torch.randn(*shape, generator=g).to(DEVICE)  # noqa: E731
    logits = (2 * normal(num_tokens, vocab)).to(dtype)
    targets = torch.randint(0, 30, (num_tokens,), generator=g).to(DEVICE)
    names = ("advantages", "token_weights", "old_logprobs", "ref_logprobs")
    return logits, targets, {name: normal(num_tokens) - (2 if name.endswith("logprobs") else 0) for name in names}


def by_autograd(logits, targets, inputs, temperature, vocab_size):
    """Return loss and gradient in fp64, from log_softmax and the loss of given log-probs."""
    logits = logits.detach().double().requires_grad_()
    everywhere = (logits[:, :vocab_size] / temperature).log_softmax(-1)
    entropy = -(everywhere.exp() * everywhere).sum(-1)
    logprobs = everywhere.gather(1, targets[:, None])[:, 0]
    out = policy_loss(logprobs, **{k: v.double() for k, v in inputs.items()}, entropy=entropy, **OPTIONS)
    out.loss.backward()
    return out.loss.detach(), logits.grad


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_loss_and_gradient_are_those_of_autograd(implementation, in_place, dtype, tolerance):
    logits, targets, inputs = problem(dtype=dtype)
    loss, grad = by_autograd(logits, targets, inputs, 0.8, 33)
    leaf = logits.clone().requires_grad_()
    given = leaf * 1
    before = given.detach().clone()
    out = policy_loss_from_logits(given, targets, **inputs, **OPTIONS, temperature=0.8, vocab_size=33,
                                  in_place=in_place, implementation=implementation)  # fmt: skip
    assert in_place or torch.equal(given, before)
    (2 * out.loss).backward()
    assert leaf.grad.dtype == dtype and leaf.grad[:, 33:].eq(0).all()
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(leaf.grad.double(), 2 * grad, rtol=tolerance, atol=tolerance * grad.abs().max().item())


@pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))
def test_in_place_the_memory_of_the_logits_holds_the_gradient():
    logits, targets, inputs = problem()
    leaf = logits.clone().requires_grad_()
    given = leaf * 1
    (3 * policy_loss_from_logits(given, targets, **inputs, in_place=True, implementation="triton").loss).backward()
    assert torch.equal(given, leaf.grad)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_in_place_refuses_other_uses_of_the_logits_but_the_backward_pass_may_run_again(implementation):
    logits, targets, inputs = problem()
    leaf = logits.clone().requires_grad_()
    given = leaf * 1
    other = given.exp().sum() + (given * given).sum()
    out = policy_loss_from_logits(given, targets, **inputs, in_place=True, implementation=implementation)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()
    out.loss.backward(retain_graph=True)
    once = leaf.grad.clone()
    out.loss.backward()
    assert once.any() and torch.equal(leaf.grad, 2 * once)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_tokens(implementation):
    logits, targets, inputs = problem(0)
    logits.requires_grad_()
    out = policy_loss_from_logits(logits, targets, **inputs, implementation=implementation)
    out.loss.backward()
    assert out.loss.item() == 0 and logits.grad.shape == (0, 37)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(3)}, r"logits must be a floating \[T, V_local\].* got \[3\]"),
        ({"logits": torch.zeros(7, 4).t()}, r"strides \(1, 4\)"),
        ({"logits": torch.zeros(4, 7, dtype=torch.int64)}, "got .* in torch.int64"),
        ({"targets": torch.tensor([0, 1, 7, 3])}, "0 … 6, the vocabulary, but span 0 … 7"),
        ({"vocab_size": 8}, "vocab_size 8 must be between 1 and the 7"),
        ({"temperature": -1.0}, "temperature -1.0 must be above 0"),
        ({"advantages": torch.zeros(3)}, r"advantages has shape \[3\], but there are 4 tokens"),
        ({"implementation": "cuda"}, "'cuda' is unknown"),
    ],
)
def test_wrong_arguments_raise_errors_that_explain(changes, message):
    arguments = {
        "logits": torch.zeros(4, 7),
        "targets": torch.zeros(4, dtype=torch.int64),
        "advantages": torch.zeros(4),
        "token_weights": torch.zeros(4),
    } | changes
    with pytest.raises(ValueError, match=message):
        policy_loss_from_logits(**arguments)
