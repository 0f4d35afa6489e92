"""Hand gradients that the forward pass has computed to autograd.

Change here: how such gradients reach their inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def with_gradients(
    loss: Tensor, inputs: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...], *, reuse: bool = False
) -> Tensor:
    """Return the scalar `loss` on the graph of `inputs`; its backward pass gives them `gradients` · incoming gradient.

    gradients  one per input, of its shape and dtype; None for an input that needs none.
    reuse      multiplies in the gradients' own memory. Only one backward pass is possible then.
    """
    return _ReadyGradients.apply(loss, reuse, *inputs, *gradients)


class _ReadyGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss: Tensor, reuse: bool, *inputs_and_gradients: Tensor | None) -> Tensor:
        ctx.reuse = reuse
        ctx.save_for_backward(*inputs_and_gradients[len(inputs_and_gradients) // 2 :])
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor):
        scale = torch.Tensor.mul_ if ctx.reuse else torch.mul
        ready = [g if g is None else scale(g, grad_loss) for g in ctx.saved_tensors]
        return None, None, *ready, *(None for _ in ready)
