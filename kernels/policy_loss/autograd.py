"""Hand gradients that the forward pass has computed to autograd.

Change here: how such gradients reach their inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def with_gradients(loss: Tensor, inputs: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...]) -> Tensor:
    """Return the scalar `loss` on the graph of `inputs`; its backward pass gives them `gradients` · incoming gradient.

    gradients  one per input, of its shape and dtype; None for an input that needs none. A backward pass that does not retain
               the graph multiplies in their own memory, so it allocates nothing: it comes when activations are at their peak.
    """
    return _ReadyGradients.apply(loss, *inputs, *gradients)


class _ReadyGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss: Tensor, *inputs_and_gradients: Tensor | None) -> Tensor:
        ctx.save_for_backward(*inputs_and_gradients[len(inputs_and_gradients) // 2 :])
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor):
        needed_again = torch._C._autograd._get_current_graph_task_keep_graph()
        scale = torch.mul if needed_again else torch.Tensor.mul_
        ready = [g if g is None else scale(g, grad_loss) for g in ctx.saved_tensors]
        return None, *ready, *(None for _ in ready)
