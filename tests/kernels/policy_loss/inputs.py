"""Random inputs for the tests of the Triton kernels."""

from __future__ import annotations

import torch
from dapo_mcore.kernels.policy_loss import TokenInputs

from tests.kernels.triton_here import DEVICE


def random_inputs(num: int, seed: int = 0) -> tuple[torch.Tensor, TokenInputs]:
    """Return log-probs fp32 [num] and inputs whose ratios lie on both sides of every clip bound."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda: torch.randn(num, generator=g)  # noqa: E731
    logprobs = -normal().abs()
    tokens = TokenInputs(normal(), normal().abs(), logprobs + normal(), logprobs + normal(), normal().exp())
    tokens = tokens._replace(old_kl_coefs=normal().clamp(min=0))
    return logprobs.to(DEVICE), TokenInputs(*(x.to(DEVICE) for x in tokens))


def random_logits(num_tokens: int = 12, vocab: int = 70) -> tuple[torch.Tensor, torch.Tensor, TokenInputs]:
    """Return logits fp32 [num_tokens, vocab], targets and inputs per token."""
    g = torch.Generator().manual_seed(1)
    logits = (torch.randn(num_tokens, vocab, generator=g) * 3).to(DEVICE)
    return logits, torch.randint(0, vocab, (num_tokens,), generator=g).to(DEVICE), random_inputs(num_tokens)[1]
