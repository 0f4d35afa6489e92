"""FP8 (e4m3) quantisation of weights for an FP8 rollout engine, and of activations by row.

Change here: which arguments are accepted, their errors, and which implementation runs: kernel.py (Triton) for CUDA
tensors where Triton is installed, otherwise torch_path.py (any device). The two agree bitwise.

A group (a tile or a row) with largest magnitude a stores x · (448 / a), rounded to the nearest e4m3 number (ties to
even), and the scale a / 448 to multiply by. |error| <= 2^-4 · |x|, or a · 2^-10 / 448 if that is larger.
Scales are at least 2^-126, so a group of zeros gives zeros. If a group holds an infinity or NaN, its scale and all its
codes become NaN: e4m3fn has no infinity, and a broken weight must not look like a weight.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from . import torch_path

__all__ = ["dequantize_blocks", "dequantize_rows", "quantize_blocks", "quantize_rows"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCKS = (16, 32, 64, 128)


@torch.no_grad()
def quantize_blocks(weight: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """Return float8_e4m3fn [N, K] and fp32 scales [ceil(N/block), ceil(K/block)], named `weight_scale_inv` in checkpoints.

    weight   [N, K] in bf16, fp16 or fp32, elements of a row adjacent; rows may be strided (a slice of columns).
    block    side of the square tiles that share a scale: 16, 32, 64 or 128. The last tiles may be smaller.
    No collective: quantise whole matrices, or shards whose borders are multiples of `block`.
    Raises ValueError if the shape, dtype or strides do not fit.
    Source: the layout of DeepSeek-V3's inference/kernel.py and of SGLang's `weight_block_size: [128, 128]`.
    """
    _check_block(block)
    _check_matrix("weight", weight)
    return _implementation(weight).quantize_blocks(weight, block)


@torch.no_grad()
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return float8_e4m3fn [N, K] and fp32 [N, 1]: one scale per row (output channel of a weight, or token).

    Argument and errors are those of quantize_blocks.
    """
    _check_matrix("x", x)
    return _implementation(x).quantize_rows(x)


@torch.no_grad()
def dequantize_blocks(quantized: Tensor, scale_inv: Tensor, block: int = 128, dtype: torch.dtype = torch.float32):
    """Return [N, K] in `dtype`: each element times its tile's scale, in fp32. For checks: it expands the scales to [N, K].

    Raises ValueError unless the scales are those of [N, K] in tiles of `block`.
    """
    _check_block(block)
    _check_scales(quantized, scale_inv, [-(-size // block) for size in quantized.shape])
    return torch_path.dequantize_blocks(quantized, scale_inv, block).to(dtype)


@torch.no_grad()
def dequantize_rows(quantized: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return [N, K] in `dtype`: each element times its row's scale, in fp32.

    Raises ValueError unless the scales are [N, 1].
    """
    _check_scales(quantized, scale_inv, [len(quantized), 1])
    return torch_path.dequantize_rows(quantized, scale_inv).to(dtype)


def _implementation(x: Tensor):
    """Return the module that quantises `x`."""
    if not x.is_cuda or find_spec("triton") is None:
        return torch_path
    from . import kernel

    return kernel


def _check_matrix(name: str, x: Tensor) -> None:
    if x.dim() != 2 or x.numel() == 0 or x.dtype not in DTYPES:
        raise ValueError(
            f"{name} must be [N, K], both at least 1, in bfloat16, float16 or float32, got {list(x.shape)} in {x.dtype}"
        )
    if x.stride(1) != 1 and x.shape[1] > 1:
        raise ValueError(
            f"{name} has strides {list(x.stride())}, but the elements of a row must be adjacent; "
            f"a transposed matrix needs .contiguous()"
        )


def _check_block(block: int) -> None:
    if block not in BLOCKS:
        raise ValueError(f"block {block} must be one of {', '.join(map(str, BLOCKS))}; engines expect 128")


def _check_scales(quantized: Tensor, scale_inv: Tensor, expected: list[int]) -> None:
    if quantized.dim() != 2 or quantized.dtype != torch.float8_e4m3fn:
        raise ValueError(f"quantized must be float8_e4m3fn [N, K], got {quantized.dtype} {list(quantized.shape)}")
    if list(scale_inv.shape) != expected or scale_inv.dtype != torch.float32:
        raise ValueError(
            f"scale_inv must be float32 {expected} for a quantized {list(quantized.shape)}, "
            f"got {scale_inv.dtype} {list(scale_inv.shape)}"
        )
