"""SwiGLU, the activation of gated MLPs: y = silu(gate) · up, optionally times a weight per token (an expert's probability).

Change here: which arguments are accepted, their errors, and which implementation runs: kernel.py (Triton) for bf16, fp16 and
fp32 CUDA tensors where Triton is installed, otherwise torch_path.py (any device and dtype). autograd.py keeps only the input.
Per token of F bf16 outputs, the forward pass moves 3·F·2 bytes (reads gate and up, writes y), the backward pass 5·F·2 (reads
them and dy, writes both gradients): each byte once. What torch.compile made of megatron-core's SwiGLU took 8.2 ms a call on an
H100 where these bytes ask for 2. The kernels here are not yet measured on a GPU.
"""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from . import torch_path
from .autograd import SwiGLU

__all__ = ["swiglu"]

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def swiglu(x: Tensor, weights: Tensor | None = None, *, saved_dtype: torch.dtype | None = None) -> Tensor:
    """Return silu(gate) · up [T, F] in the dtype of `x`, times `weights` of each token; differentiable.

    x            floating [T, 2·F]: the gate in the first half of a row, up in the second, as megatron-core's fused fc1 gives
                 them. Elements of a row are adjacent; rows may be strided. T may be 0.
    weights      floating [T] or [T, 1], on the device of x; their gradient is the sum over a row.
    saved_dtype  dtype in which x is kept for the backward pass (float8_e4m3fn halves its memory and rounds the gradients);
                 None keeps x itself, without a copy.
    The kernel computes in fp32 and rounds once. On a CPU each operation rounds, like the same formula in PyTorch, bit for bit.
    No collective. Raises ValueError if a shape, dtype, stride or device does not fit.
    """
    _check_input(x)
    if weights is not None:
        weights = _column(weights, x)
    return SwiGLU.apply(x, weights, saved_dtype, choose(x))


def choose(x: Tensor) -> ModuleType:
    """Return the module that computes on `x`. It offers `forward` and `backward`."""
    if not x.is_cuda or x.dtype not in KERNEL_DTYPES or find_spec("triton") is None:
        return torch_path
    from . import kernel

    return kernel


def _check_input(x: Tensor) -> None:
    if x.dim() != 2 or x.shape[1] == 0 or x.shape[1] % 2 or not x.is_floating_point():
        raise ValueError(
            f"x must be a floating [T, 2·F] with F at least 1, gate and up side by side, got {list(x.shape)} in {x.dtype}"
        )
    if x.stride(1) != 1:
        raise ValueError(
            f"x has strides {list(x.stride())}, but the elements of a row must be adjacent; "
            f"a transposed matrix needs .contiguous()"
        )


def _column(weights: Tensor, x: Tensor) -> Tensor:
    """Return the weights as [T, 1]."""
    if weights.shape not in ((len(x),), (len(x), 1)) or not weights.is_floating_point() or weights.device != x.device:
        raise ValueError(
            f"weights must be floating [{len(x)}] or [{len(x)}, 1] on {x.device}, one per row of x, "
            f"got {weights.dtype} {list(weights.shape)} on {weights.device}"
        )
    return weights.view(-1, 1)
