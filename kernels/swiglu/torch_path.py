"""SwiGLU and its gradient in PyTorch.

Change here: the formula; kernel.py repeats it in Triton. The operations and their order are those of autograd on
(silu(gate) · up · weights).to(dtype), so the bits are those of that formula. Training uses this file on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def forward(x: Tensor, weights: Tensor | None) -> Tensor:
    """Return [T, F] in the dtype of `x` [T, 2·F]."""
    gate, up = x.chunk(2, -1)
    y = silu(gate) * up
    return y if weights is None else (y * weights).to(x.dtype)


def backward(grad: Tensor, x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the gradients to `x` [T, 2·F] and to `weights` [T, 1], from that to the output [T, F]."""
    gate, up = x.chunk(2, -1)
    activated, grad_weights = silu(gate), None
    if weights is not None:
        grad = grad.to(torch.promote_types(x.dtype, weights.dtype))
        grad_weights = (grad * (activated * up)).sum(-1, keepdim=True).to(weights.dtype)
        grad = (grad * weights).to(x.dtype)
    grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return torch.cat((grad_gate, grad * activated), -1), grad_weights
