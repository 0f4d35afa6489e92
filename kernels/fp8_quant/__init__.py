"""FP8 (e4m3) quantisation of weights for an FP8 rollout engine, and of activations by row.

Change here: what is accepted, what a wrong argument is told, and which implementation runs. The mathematics is in
reference.py (any device); kernel.py is the same in Triton, for CUDA tensors where Triton is installed.

A group (a tile, or a row) with largest magnitude a stores x · (448 / a), rounded to the nearest e4m3 number, of two
equally near the even one, and the scale a / 448 to multiply by: |error| <= 2^-4 · |x|, or a · 2^-10 / 448 where that is
more. Scales are never below 2^-126, so that a group of zeros gives zeros. A group that holds an infinity or NaN becomes
NaN as a whole, scale and codes: e4m3fn has no infinity, and a broken weight must not look like a weight.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from . import reference

__all__ = ["dequantize_blocks", "dequantize_rows", "quantize_blocks", "quantize_rows"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCKS = (16, 32, 64, 128)


@torch.no_grad()
def quantize_blocks(weight: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """(float8_e4m3fn [N, K], fp32 [ceil(N/block), ceil(K/block)]): `weight` and `weight_scale_inv` of a checkpoint.

    weight   [N, K] in bf16, fp16 or fp32, elements of a row adjacent; rows may lie apart (a slice of columns).
    block    side of the square tiles that share a scale: 16, 32, 64 or 128. The last tiles may be smaller.
    No collective: quantise whole matrices, or shards whose borders are multiples of `block`.
    Raises ValueError for a shape, dtype or layout that does not fit.
    Source: the layout of DeepSeek-V3's inference/kernel.py and of SGLang's `weight_block_size: [128, 128]`.
    """
    _check_block(block)
    _check_matrix("weight", weight)
    return _implementation(weight).quantize_blocks(weight, block)


@torch.no_grad()
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(float8_e4m3fn [N, K], fp32 [N, 1]): one scale a row, that is an output channel of a weight or a token.

    Argument and errors as in quantize_blocks.
    """
    _check_matrix("x", x)
    return _implementation(x).quantize_rows(x)


@torch.no_grad()
def dequantize_blocks(quantized: Tensor, scale_inv: Tensor, block: int = 128, dtype: torch.dtype = torch.float32):
    """[N, K] in `dtype`: each element times its tile's scale, in fp32. For checks: it expands the scales to [N, K].

    Raises ValueError when the scales are not those of [N, K] in tiles of `block`.
    """
    _check_block(block)
    _check_scales(quantized, scale_inv, [-(-size // block) for size in quantized.shape])
    return reference.dequantize_blocks(quantized, scale_inv, block).to(dtype)


@torch.no_grad()
def dequantize_rows(quantized: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[N, K] in `dtype`: each element times its row's scale, in fp32. Raises ValueError unless the scales are [N, 1]."""
    _check_scales(quantized, scale_inv, [len(quantized), 1])
    return reference.dequantize_rows(quantized, scale_inv).to(dtype)


def _implementation(x: Tensor):
    """The module that does the work: kernel for a CUDA tensor where Triton is installed, else reference."""
    if not x.is_cuda or find_spec("triton") is None:
        return reference
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
