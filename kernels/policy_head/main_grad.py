"""Eager gradient mode: the forward pass adds the weight's gradient to Megatron's fp32 main_grad.

Change here: when this mode is allowed, and which gradient autograd and Megatron's DistributedDataParallel receive.
It saves a [V_local, H] gradient that would be kept until the backward pass, and one read and write of it. The forward
pass then changes main_grad, so it must run exactly once per backward pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class MainGradTarget(NamedTuple):
    """The buffer `main_grad` [V_local, H], to which scale · d loss / d weight is added."""

    main_grad: Tensor
    scale: float


def main_grad_target(
    weight: Tensor, main_grad: Tensor | None, scale: float, dtype: torch.dtype
) -> MainGradTarget | None:
    """Check `main_grad`, which must have `dtype`, and return the target; None outside the eager gradient mode.

    Raises ValueError if main_grad does not fit the weight. Raises RuntimeError if the forward pass may run twice or
    without a backward pass: under no_grad (also the first pass of a reentrant checkpoint), and during a backward pass
    (the replay of a checkpoint).
    """
    if main_grad is None:
        if scale != 1.0:
            raise ValueError(f"grad_scale {scale} is for main_grad, which is None: leave it 1, backward scales")
        return None
    if main_grad.shape != weight.shape or main_grad.dtype != dtype or main_grad.device != weight.device:
        raise ValueError(
            f"main_grad must be {dtype} {list(weight.shape)} on {weight.device}, like weight, "
            f"got {main_grad.dtype} {list(main_grad.shape)} on {main_grad.device}"
        )
    if not main_grad.is_contiguous():
        raise ValueError(f"main_grad must be contiguous, got strides {main_grad.stride()}: it is added to in place")
    if not weight.requires_grad:
        raise ValueError("main_grad was given, but weight does not require a gradient; leave main_grad out")
    _check_runs_once()
    return MainGradTarget(main_grad.detach(), scale)


def with_hidden_gradient(
    loss: Tensor, hidden: Tensor, weight: Tensor, grad_hidden: Tensor | None, target: MainGradTarget
) -> Tensor:
    """Return the scalar `loss` on the graph; its backward pass gives hidden its gradient and weight a dummy.

    The incoming gradient must equal target.scale, with which main_grad was written. Otherwise the backward pass raises
    ValueError on the CPU; on a GPU a device-side assertion fails, because that needs no synchronisation.
    """
    return _EagerLoss.apply(hidden, weight, loss, grad_hidden, target.scale)


class _EagerLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, loss: Tensor, grad_hidden: Tensor | None, scale: float) -> Tensor:
        ctx.weight, ctx.scale = weight, scale
        ctx.save_for_backward(grad_hidden)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor):
        _check_scale(grad_loss, ctx.scale)
        (grad_hidden,) = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss
        return grad_hidden, _dummy_gradient(ctx.weight), None, None, None


def _dummy_gradient(weight: Tensor) -> Tensor:
    """Return a gradient for autograd, because DDP's hooks need one (megatron-core 0.16, tensor_parallel/layers.py).

    DDP ignores its value, except with `zero_out_wgrad`, which says that an embedding shares the weight. The dummy must be
    zero then, and also for users without DDP.
    """
    ignored = hasattr(weight, "grad_added_to_main_grad") and not getattr(weight, "zero_out_wgrad", False)
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight) if ignored else torch.zeros_like(weight)


def _check_runs_once() -> None:
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "main_grad was given under torch.no_grad(), so a gradient would be added with no backward pass to own it; "
            "leave main_grad out there, and keep the head outside activation checkpointing"
        )
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "main_grad was given while a backward pass runs, as in the replay of an activation checkpoint, so the "
            "gradient would be added twice; keep the head outside activation checkpointing, or leave main_grad out"
        )


def _check_scale(grad_loss: Tensor, scale: float) -> None:
    same = grad_loss == scale
    rule = (
        f"the forward pass added grad_scale {scale} · d loss / d weight to main_grad, so the loss must receive {scale}"
    )
    if grad_loss.is_cuda:
        torch._assert_async(same, rule)
    elif not same:
        raise ValueError(f"{rule}, but got {grad_loss.item()}; pass that as grad_scale")
