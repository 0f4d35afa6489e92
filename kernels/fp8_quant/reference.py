"""FP8 quantisation in plain PyTorch: scales, the rounding to e4m3 in integer arithmetic, and the way back.

Change here: how a scale follows from a block's largest magnitude. kernel.py does the same operations in the same order,
so the two agree bit by bit; the tests compare the rounding with torch's own cast on every bf16 and fp16 number.
Letters: N rows, K columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0
# The magnitude whose scale is the smallest normal fp32 number, 2^-126: scales of smaller blocks would lose bits, and
# 448 / magnitude would overflow for a block of zeros.
MIN_MAGNITUDE = E4M3_MAX * 2.0**-126


def quantize_blocks(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """e4m3 [N, K], and the fp32 scale of every block x block tile [ceil(N/block), ceil(K/block)]."""
    rows, columns = weight.shape
    tiles = weight.new_zeros(-(-rows // block) * block, -(-columns // block) * block)
    tiles[:rows, :columns] = weight
    tiles = tiles.view(len(tiles) // block, block, tiles.shape[1] // block, block).transpose(1, 2)  # [N', K', b, b]
    codes, scales = _quantize(tiles.flatten(2))
    codes = codes.view(tiles.shape).transpose(1, 2).reshape(len(scales) * block, -1)
    return codes[:rows, :columns].contiguous().view(torch.float8_e4m3fn), scales


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 [N, K], and the fp32 scale of every row [N, 1]."""
    codes, scales = _quantize(x)
    return codes.view(torch.float8_e4m3fn), scales[:, None]


def dequantize_blocks(quantized: Tensor, scale_inv: Tensor, block: int) -> Tensor:
    """fp32 [N, K]: every element times its tile's scale, one rounding."""
    rows, columns = quantized.shape
    scales = scale_inv.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
    return quantized.float() * scales


def dequantize_rows(quantized: Tensor, scale_inv: Tensor) -> Tensor:
    """fp32 [N, K]: every element times its row's scale, one rounding."""
    return quantized.float() * scale_inv


def e4m3_codes(x: Tensor) -> Tensor:
    """uint8 of the shape of `x` (fp32): the e4m3 code of the nearest number, of two equally near the even one.

    For |x| <= 464, the last number that rounds to 448; scaled values never pass 448 · (1 + 2^-22).
    An fp32 number is (8 + m) · 2^e with a fraction of 23 bits, of which e4m3 keeps 3; below 2^-6 it counts in steps of
    2^-9. Either way the code is an integer shifted right, rounded by adding just under half, and the kept bit's parity.
    """
    bits = x.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    exponent = magnitude >> 23
    subnormal = exponent < 121  # fp32's bias 127 less 6
    # Past 25 places everything rounds to 0. That takes in fp32's own subnormals, which have no leading 1.
    shift = torch.where(subnormal, (141 - exponent).clamp(max=25), 20)
    significand = torch.where(subnormal, (magnitude & 0x7FFFFF) | 0x800000, magnitude)
    half_and_parity = (1 << (shift - 1)) - 1 + ((significand >> shift) & 1)
    code = (significand + half_and_parity) >> shift
    code = torch.where(subnormal, code, code - (120 << 3))  # from fp32's exponent bias to e4m3's, 7
    return (code | ((bits >> 24) & 0x80)).to(torch.uint8)


def _quantize(groups: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 codes of the shape of `groups` [..., n], and fp32 scales [...] of the groups of n that share one."""
    x = groups.float()
    # The largest magnitude as bits, an integer maximum: NaN and infinity come out on top.
    largest = (x.view(torch.int32) & 0x7FFFFFFF).amax(-1).view(torch.float32)
    broken = ~largest.isfinite()
    bounded = largest.clamp(min=MIN_MAGNITUDE)
    limit = bounded.new_tensor(E4M3_MAX)  # a tensor: with a Python number torch multiplies by a rounded reciprocal
    codes = e4m3_codes(x * (limit / bounded)[..., None])
    scales = (bounded / limit).masked_fill(broken, torch.nan)
    return codes.masked_fill(broken[..., None], 0x7F), scales
