"""FP8 quantisation in PyTorch: scales, rounding to e4m3 in integer arithmetic, and dequantisation.

Change here: how a scale follows from a group's largest magnitude. kernel.py repeats the operations in the same order, so
the two agree bitwise. The tests compare the rounding with torch's own cast on every bf16 and fp16 number.
Letters: N rows, K columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0
# Its scale is the smallest normal fp32 number, 2^-126. A smaller scale would lose bits, and 448 / magnitude would
# overflow for a group of zeros.
MIN_MAGNITUDE = E4M3_MAX * 2.0**-126


def quantize_blocks(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return e4m3 [N, K] and the fp32 scale of each block x block tile, [ceil(N/block), ceil(K/block)]."""
    rows, columns = weight.shape
    tiles = weight.new_zeros(-(-rows // block) * block, -(-columns // block) * block)
    tiles[:rows, :columns] = weight
    tiles = tiles.view(len(tiles) // block, block, tiles.shape[1] // block, block).transpose(1, 2)  # [N', K', b, b]
    codes, scales = _quantize(tiles.flatten(2))
    codes = codes.view(tiles.shape).transpose(1, 2).reshape(len(scales) * block, -1)
    return codes[:rows, :columns].contiguous().view(torch.float8_e4m3fn), scales


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return e4m3 [N, K] and the fp32 scale of each row, [N, 1]."""
    codes, scales = _quantize(x)
    return codes.view(torch.float8_e4m3fn), scales[:, None]


def dequantize_blocks(quantized: Tensor, scale_inv: Tensor, block: int) -> Tensor:
    """Return fp32 [N, K]: each element times its tile's scale, rounded once."""
    rows, columns = quantized.shape
    scales = scale_inv.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
    return quantized.float() * scales


def dequantize_rows(quantized: Tensor, scale_inv: Tensor) -> Tensor:
    """Return fp32 [N, K]: each element times its row's scale, rounded once."""
    return quantized.float() * scale_inv


def e4m3_codes(x: Tensor) -> Tensor:
    """Return the e4m3 codes of `x` (fp32), uint8 of its shape: the nearest number, ties to even.

    Valid for |x| <= 464, the last number that rounds to 448; scaled values never exceed 448 · (1 + 2^-22).
    e4m3 keeps 3 of the 23 fraction bits of an fp32 number; below 2^-6 its numbers are multiples of 2^-9. In both cases the
    code is an integer shifted right. Adding just under half plus the parity of the last kept bit rounds it.
    """
    bits = x.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    exponent = magnitude >> 23
    subnormal = exponent < 121  # fp32's bias 127 less 6
    # A shift of 25 gives 0, also for the subnormals of fp32, which have no leading 1.
    shift = torch.where(subnormal, (141 - exponent).clamp(max=25), 20)
    significand = torch.where(subnormal, (magnitude & 0x7FFFFF) | 0x800000, magnitude)
    half_and_parity = (1 << (shift - 1)) - 1 + ((significand >> shift) & 1)
    code = (significand + half_and_parity) >> shift
    code = torch.where(subnormal, code, code - (120 << 3))  # from fp32's exponent bias to e4m3's, 7
    return (code | ((bits >> 24) & 0x80)).to(torch.uint8)


def _quantize(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return uint8 codes of the shape of `groups` [..., n], and fp32 scales [...], one per group of n."""
    x = groups.float()
    # Compare magnitudes as integers: NaN and infinity are then the largest.
    largest = (x.view(torch.int32) & 0x7FFFFFFF).amax(-1).view(torch.float32)
    broken = ~largest.isfinite()
    bounded = largest.clamp(min=MIN_MAGNITUDE)
    limit = bounded.new_tensor(E4M3_MAX)  # a tensor: with a Python number torch multiplies by a rounded reciprocal
    codes = e4m3_codes(x * (limit / bounded)[..., None])
    scales = (bounded / limit).masked_fill(broken, torch.nan)
    return codes.masked_fill(broken[..., None], 0x7F), scales
