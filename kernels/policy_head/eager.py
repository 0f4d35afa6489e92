"""Eager mode: the weight's gradient goes straight into its fp32 main_grad, in the forward pass.

Change here: when that is allowed, and what autograd and Megatron's DistributedDataParallel are told.
It saves the [V_local, H] gradient that would wait for the backward pass, and one reading and writing of it. But a
forward pass then changes main_grad, so it must run exactly once for every backward pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class EagerTarget(NamedTuple):
    """scale · d loss / d weight is added to `main_grad` [V_local, H]."""

    main_grad: Tensor
    scale: float


def eager_target(weight: Tensor, main_grad: Tensor | None, scale: float, dtype: torch.dtype) -> EagerTarget | None:
    """Where the weight's gradient goes in this forward pass; None outside eager mode.

    `dtype` is what main_grad must be.
    Raises ValueError for a main_grad that does not fit the weight, RuntimeError where the forward pass may run twice or
    without a backward pass: under no_grad (also the first pass of a reentrant checkpoint), and while a backward pass
    runs (a checkpoint's replay).
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
    return EagerTarget(main_grad.detach(), scale)


def with_hidden_gradient(
    loss: Tensor, hidden: Tensor, weight: Tensor, grad_hidden: Tensor | None, eager: EagerTarget
) -> Tensor:
    """The same scalar on the graph: backward gives hidden its gradient and weight a dummy, and tells DDP so.

    The incoming gradient must be eager.scale, with which main_grad was written: else ValueError on the CPU, and on a
    GPU a device-side assertion, which needs no synchronisation.
    """
    return _EagerLoss.apply(hidden, weight, loss, grad_hidden, eager.scale)


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
    """A gradient for autograd to pass on, as in megatron-core 0.16 (tensor_parallel/layers.py): DDP's hooks want one.

    DDP ignores its value, unless `zero_out_wgrad` says that an embedding shares the weight: then, as for users without
    DDP, it must be zero.
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
    rule = f"eager mode added grad_scale {scale} · d loss / d weight to main_grad, so the loss must receive {scale}"
    if grad_loss.is_cuda:
        torch._assert_async(same, rule)
    elif not same:
        raise ValueError(f"{rule}, but got {grad_loss.item()}; pass that as grad_scale")
