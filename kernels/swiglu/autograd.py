"""SwiGLU for autograd: the backward pass computes from the input alone.

Change here: what is kept between the two passes.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class SwiGLU(torch.autograd.Function):
    """Keeps x [T, 2·F], in `saved_dtype` unless that is None, and the weights [T, 1]; neither y nor an intermediate."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weights: Tensor | None, saved_dtype: torch.dtype | None, implementation: ModuleType
    ) -> Tensor:
        ctx.dtype, ctx.implementation = x.dtype, implementation
        ctx.save_for_backward(x if saved_dtype is None else x.to(saved_dtype), weights)
        return implementation.forward(x, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weights = ctx.saved_tensors
        return *ctx.implementation.backward(grad, x.to(ctx.dtype), weights), None, None
