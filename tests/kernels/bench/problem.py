"""The task of every contender: shapes, inputs, the loss of the log-probs, and the exact answer in fp64.

Change here: the shapes and the distribution of tokens. A problem has S sequences of T/S loss tokens and one advantage per
sequence (Liger's and fla's kernels take no other), a token-mean DAPO loss with clip 0.2 / 0.28, temperature 1, no KL.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from dapo_mcore.kernels.policy_head import reference
from dapo_mcore.kernels.policy_loss import Objective, TokenInputs
from torch import Tensor

CLIP_LOW, CLIP_HIGH = 0.2, 0.28
MODELS = {"Qwen2.5-1.5B": (1536, 151_936), "Qwen2.5-7B": (3584, 152_064), "Qwen2.5-32B": (5120, 152_064)}
MLP_WIDTHS = {"Qwen2.5-1.5B": 8_960, "Qwen2.5-7B": 18_944, "Qwen2.5-32B": 27_648, "tiny": 256}
GPU_TOKENS = (4_096, 20_480, 65_536)


@dataclass(frozen=True, slots=True)
class Shape:
    """Number of tokens T, hidden size H, and vocabulary rows of one of `tensor_parallel` ranks."""

    model: str
    tensor_parallel: int
    tokens: int
    hidden: int
    vocab: int
    sequences: int = 16

    def __str__(self) -> str:
        return f"{self.model}-TP{self.tensor_parallel}-T{self.tokens}"


CPU_SHAPES = tuple(Shape("tiny", tp, tokens, 64, 4_000 // tp) for tp in (1, 8) for tokens in (256, 512))
GPU_SHAPES = tuple(
    Shape(model, tp, tokens, hidden, vocab // tp)
    for model, (hidden, vocab) in MODELS.items()
    for tp in (1, 8)
    for tokens in GPU_TOKENS
)
GPU_PASSES = tuple(shape for shape in GPU_SHAPES if shape.model == "Qwen2.5-32B" and shape.tokens == 4_096)
# Not powers of two, and a multiple of 128 only where verl demands it (H). fp64 logits and gradient fit anywhere.
CPU_CHECK = Shape("check", 1, 96, 128, 1_003, sequences=4)
GPU_CHECK = Shape("check", 1, 1_000, 896, 30_011, sequences=8)


@dataclass(frozen=True, slots=True)
class Problem:
    """One set of inputs. A None for `old_logprobs` means on-policy: the ratio is 1."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [T] int64
    old_logprobs: Tensor | None  # [T] fp32
    sequence_advantages: Tensor  # [S] fp32
    main_grad: Tensor  # [V, H] fp32: where Megatron gathers the weight's gradient; for eager mode

    @property
    def advantages(self) -> Tensor:
        """Return fp32 [T], the advantage of each token's sequence."""
        return self.sequence_advantages.repeat_interleave(len(self.hidden) // len(self.sequence_advantages))

    def on_policy(self) -> Problem:
        return replace(self, old_logprobs=None)


@dataclass(frozen=True, slots=True)
class Answer:
    """The loss and its gradients to hidden [T, H] and weight [V, H]."""

    loss: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor


def make_problem(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int, clipped_every: int) -> Problem:
    """Return random inputs of `shape`. Every third token is confident, 1 - p down to about 1e-5, like most in a rollout.

    Ratios are near 0.95 or 1.05; every `clipped_every`-th is beyond a clip bound. No ratio is close to a bound, where the
    rounding of logits would decide whether a token is clipped.
    """
    g = torch.Generator(device).manual_seed(seed)
    normal = lambda *size: torch.randn(*size, generator=g, device=device)  # noqa: E731
    weight = normal(shape.vocab, shape.hidden).mul_(2 / math.sqrt(shape.hidden))  # logits of spread 2
    targets = torch.randint(0, shape.vocab, (shape.tokens,), generator=g, device=device)
    hidden = normal(shape.tokens, shape.hidden)
    toward = weight[targets[::3]]
    lift = math.log(shape.vocab) + 2 + 12 * torch.rand(len(toward), 1, generator=g, device=device)
    hidden[::3] += lift * toward / toward.square().sum(1, keepdim=True)
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()

    token = torch.arange(shape.tokens, device=device)
    step = torch.where(token % clipped_every == clipped_every - 1, 0.5, 0.05) * (1 - 2 * (token // 2 % 2))
    old = fp32_logprobs(hidden.detach(), weight.detach(), targets) - step
    advantages = normal(shape.sequences)
    main_grad = torch.zeros(weight.shape, device=device)
    return Problem(hidden, weight, targets, old, advantages.sign() * (0.5 + advantages.abs()), main_grad)


def fp32_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 1024) -> Tensor:
    """Return fp32 [T] from fp32 logits, chunk by chunk (products of bf16 numbers are exact in fp32)."""
    parts = []
    for rows in torch.arange(len(hidden)).split(chunk):
        logits = hidden[rows[0] : rows[-1] + 1].float() @ weight.float().t()
        parts.append(logits.gather(1, targets[rows[0] : rows[-1] + 1, None])[:, 0] - logits.logsumexp(1))
    return torch.cat(parts)


def token_mean_loss(logprobs: Tensor, problem: Problem) -> Tensor:
    """Return Σ_t max(-A·r, -A·clip(r)) / T of `logprobs` [T], as in DAPO, arXiv 2503.14476 eq. 8."""
    old = logprobs.detach() if problem.old_logprobs is None else problem.old_logprobs
    ratio, advantages = (logprobs - old).exp(), problem.advantages
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)).mean()


def exact_answer(p: Problem) -> Answer:
    """Return the definition's answer in fp64, from the whole [T, V] logits."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (p.hidden, p.weight))
    tokens = TokenInputs(p.advantages, hidden.new_full((len(hidden),), 1 / len(hidden)), p.old_logprobs)
    out = reference.linear_policy_loss(hidden, weight, p.targets, tokens, Objective(CLIP_LOW, CLIP_HIGH))
    return answer_of(out.loss, replace(p, hidden=hidden, weight=weight))


def answer_of(loss: Tensor, problem: Problem) -> Answer:
    """Run the backward pass and return loss and gradients."""
    return Answer(loss.detach(), *torch.autograd.grad(loss, (problem.hidden, problem.weight)))
