"""Implementations of the DAPO loss and its gradients from hidden states, as functions Problem -> Answer.

Change here: add a contender with one function and one line in CONTENDERS. Functions import their packages themselves, so a
missing package fails that contender, shown in the table, and not the benchmark.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
from dapo_mcore.kernels.policy_head import Objective, TokenInputs, chunk_tokens_for, linear_policy_loss
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from tests.kernels.bench.problem import CLIP_HIGH, CLIP_LOW, Answer, Problem, answer_of, token_mean_loss

TORCH_CHUNK = 2048


@dataclass(frozen=True, slots=True)
class Contender:
    """An implementation with its name.

    on_policy   takes no old log-probs: it computes less, and is checked against the on-policy answer.
    gpu_only    cannot run without a GPU, or compiles there for longer than all other contenders take.
    ours        part of this project: if it is wrong, nothing is reported.
    """

    name: str
    compute: Callable[[Problem], Answer]
    on_policy: bool = False
    gpu_only: bool = False
    ours: bool = False

    def __call__(self, problem: Problem) -> Answer:
        if self.gpu_only and not problem.hidden.is_cuda:
            raise RuntimeError("needs a GPU")
        return self.compute(problem)


def ours(p: Problem, workspace_bytes: float, logits_dtype: torch.dtype = torch.float32) -> Answer:
    return answer_of(_policy_loss(p, workspace_bytes, logits_dtype), p)


def ours_eager(p: Problem, workspace_bytes: float, logits_dtype: torch.dtype = torch.float32) -> Answer:
    """Add the gradient to weight to main_grad, as in Megatron; the values of earlier calls stay there."""
    loss = _policy_loss(p, workspace_bytes, logits_dtype, main_grad=p.main_grad)
    return Answer(loss.detach(), *torch.autograd.grad(loss, p.hidden), p.main_grad)


def naive(p: Problem) -> Answer:
    """Compute the whole [T, V] in fp32, as in a textbook."""
    return answer_of(token_mean_loss(_logprobs(p.hidden, p.weight, p.targets), p), p)


def compiled(p: Problem) -> Answer:
    return answer_of(token_mean_loss(_compile(_logprobs)(p.hidden, p.weight, p.targets), p), p)


def chunked(p: Problem) -> Answer:
    """Compute a chunk of tokens at a time, and its logits again in the backward pass."""
    parts = zip(p.hidden.split(TORCH_CHUNK), p.targets.split(TORCH_CHUNK))
    logprobs = [checkpoint(_logprobs, hidden, p.weight, targets, use_reentrant=False) for hidden, targets in parts]
    return answer_of(token_mean_loss(torch.cat(logprobs), p), p)


def liger_grpo(p: Problem) -> Answer:
    """Compute from logits, which the kernel overwrites with their gradient."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    loss, _ = triton_grpo_loss(
        _logits_with_a_spare_row(p), _by_sequence(p, p.old_logprobs), None, _by_sequence(p, p.targets),
        p.sequence_advantages, temperature=1.0, beta=0.0, eps_low=CLIP_LOW, eps_high=CLIP_HIGH, loss_type="dapo",
        reduce=True,
    )  # fmt: skip
    return answer_of(loss, p)


def liger_fused_linear(p: Problem) -> Answer:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    head = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=p.hidden.is_cuda, use_ref_model=False, epsilon_low=CLIP_LOW, epsilon_high=CLIP_HIGH
    )
    targets = _by_sequence(p, p.targets)
    old = _by_sequence(p, p.old_logprobs)
    mask = torch.ones_like(old)
    hidden = _by_sequence(p, p.hidden)
    loss, _ = head(hidden, p.weight, targets, mask, p.sequence_advantages, old_per_token_logps=old)
    return answer_of(loss, p)


def liger_scaled_cross_entropy(p: Problem) -> Answer:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return answer_of(
        token_mean_loss(-LigerFusedLinearScaledCrossEntropyFunction.apply(p.hidden, p.weight, p.targets), p), p
    )


def liger_tensor_parallel(p: Problem) -> Answer:
    """Use the native CUTLASS and NVSHMEM kernels in a group of one rank.

    Raises RuntimeError without the package liger-cute-kernels: Liger would then compute in torch, 512 tokens at a time.
    """
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyTPFunction as function
    from liger_kernel.ops.cute.fused_linear_scaled_cross_entropy_tp import is_available

    if not is_available():
        raise RuntimeError("needs liger-cute-kernels, the native part of Liger's TP cross-entropy")
    from liger_cute_kernels import nvshmem

    if not dist.is_initialized():
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    nvshmem.resolve_team(dist.group.WORLD, create=True)
    return answer_of(token_mean_loss(-function.apply(p.hidden, p.weight, p.targets, dist.group.WORLD), p), p)


def verl(p: Problem) -> Answer:
    logprobs, _ = _verl_kernels().linear_cross_entropy(p.hidden, p.weight, p.targets, 1.0, "none", None)
    return answer_of(token_mean_loss(logprobs, p), p)


def cut_cross_entropy(p: Problem) -> Answer:
    """Use the defaults, which leave out gradients below a threshold."""
    from cut_cross_entropy import linear_cross_entropy

    return answer_of(token_mean_loss(-linear_cross_entropy(p.hidden, p.weight, p.targets, reduction="none"), p), p)


def fla_grpo(p: Problem) -> Answer:
    from fla.modules.grpo import fused_grpo_loss

    targets = _by_sequence(p, p.targets)
    no_reference = torch.zeros(targets.shape, device=targets.device)
    losses = fused_grpo_loss(
        _logits_with_a_spare_row(p), no_reference, targets, p.sequence_advantages, beta=0.0, inplace=True
    )
    return answer_of(losses.mean(), p)


CONTENDERS = (
    Contender("ours, 4 GB", partial(ours, workspace_bytes=4e9), ours=True),
    Contender("ours, eager, 4 GB", partial(ours_eager, workspace_bytes=4e9), ours=True),
    Contender("ours, eager, 2 GB", partial(ours_eager, workspace_bytes=2e9), ours=True),
    Contender("ours, eager, 1 GB", partial(ours_eager, workspace_bytes=1e9), ours=True),
    # these round logits like the other packages, so their tolerance applies
    Contender(
        "ours, bf16 logits, 4 GB", partial(ours, workspace_bytes=4e9, logits_dtype=torch.bfloat16), gpu_only=True
    ),
    *(
        Contender(
            f"ours, eager, bf16 logits, {gigabytes} GB",
            partial(ours_eager, workspace_bytes=gigabytes * 1e9, logits_dtype=torch.bfloat16),
            gpu_only=True,
        )
        for gigabytes in (4, 2)
    ),
    Contender("torch", naive),
    Contender("torch.compile", compiled, gpu_only=True),
    Contender("torch, chunks + checkpoint", chunked),
    Contender("Liger triton_grpo_loss", liger_grpo, gpu_only=True),
    Contender("Liger fused linear GRPO", liger_fused_linear),
    Contender("Liger scaled cross-entropy", liger_scaled_cross_entropy),
    Contender("Liger scaled cross-entropy, TP", liger_tensor_parallel, gpu_only=True),
    Contender("verl linear_cross_entropy", verl, gpu_only=True),
    Contender("cut-cross-entropy", cut_cross_entropy, gpu_only=True),
    Contender("fla fused_grpo_loss", fla_grpo, on_policy=True, gpu_only=True),
)


def _policy_loss(p: Problem, workspace_bytes: float, logits_dtype: torch.dtype = torch.float32, **options) -> Tensor:
    chunk = chunk_tokens_for(int(workspace_bytes), len(p.weight), logits_dtype)
    weights = torch.full((len(p.hidden),), 1 / len(p.hidden), device=p.hidden.device)
    tokens, objective = TokenInputs(p.advantages, weights, p.old_logprobs), Objective(CLIP_LOW, CLIP_HIGH)
    return linear_policy_loss(
        p.hidden, p.weight, p.targets, tokens, objective, chunk_tokens=chunk, logits_dtype=logits_dtype, **options
    ).loss


def _logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return log-probs [T] by log_softmax in fp32 (fp64 for fp64) of logits in the inputs' dtype."""
    logits = hidden @ weight.t()
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def _by_sequence(p: Problem, tokens: Tensor) -> Tensor:
    """Return [T, …] as [S, T/S, …]."""
    return tokens.view(len(p.sequence_advantages), -1, *tokens.shape[1:])


def _logits_with_a_spare_row(p: Problem) -> Tensor:
    """Return logits [S, T/S + 1, V], because these kernels ignore the last row of a sequence."""
    return pad(_by_sequence(p, p.hidden), (0, 0, 0, 1)) @ p.weight.t()


@cache
def _compile(function: Callable) -> Callable:
    return torch.compile(function)


@cache
def _verl_kernels() -> ModuleType:
    """Return verl.utils.kernel.linear_cross_entropy, loaded without verl's dependencies over stubs of its packages.

    Raises ModuleNotFoundError if verl is not installed.
    """
    spec = importlib.util.find_spec("verl")  # does not run verl/__init__.py
    if spec is None:
        raise ModuleNotFoundError("No module named 'verl'")
    folder = Path(spec.submodule_search_locations[0]) / "utils" / "kernel"
    for name in ("verl", "verl.utils", "verl.utils.kernel"):
        package = sys.modules[name] = ModuleType(name)
        package.__path__ = []
    device = sys.modules["verl.utils.device"] = ModuleType("verl.utils.device")
    device.is_cuda_available = torch.cuda.is_available()
    device.get_device_name = lambda: "cuda" if torch.cuda.is_available() else "cpu"
    device.get_device_capability = torch.cuda.get_device_capability
    device.get_torch_device = lambda: torch.cuda
    for name in ("kernels", "linear_cross_entropy"):
        spec = importlib.util.spec_from_file_location(f"verl.utils.kernel.{name}", folder / f"{name}.py")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        setattr(sys.modules["verl.utils.kernel"], name, module)  # they import each other
        spec.loader.exec_module(module)
    return module
