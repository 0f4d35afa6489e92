"""FP8 quantisation in Triton: one program per tile or per row; one read (rows: a second one, from L2) and one write.

Change here: how the work is divided and launched. The arithmetic repeats torch_path.py operation by operation, so that the
two agree bitwise. Rounding to e4m3 is one instruction for two numbers on GPUs that have it (compute capability 8.9 and
later). Elsewhere it is integer arithmetic, about 20 instructions per number, and also in Triton's interpreter, whose
fp32 → fp8 cast is wrong.
With integer rounding an H100 quantised 4.6e11 (tiles) to 5.4e11 (rows) numbers per second, 46 % of a device copy's bandwidth
for tiles (kernels/results/nvidia-h100-80gb-hbm3-2026-11-26.json): its integer units were the limit. A tile in 32 warps also
filled a multiprocessor alone (46 registers), so nothing was loaded while it computed; with 16 warps two tiles fit. The
conversion by hardware and its 16 warps are not yet measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .torch_path import E4M3_MAX, MIN_MAGNITUDE

INTERPRETED = triton.knobs.runtime.interpret
ROW_BLOCK = 2048
TILE_WARPS = {True: 16, False: 32}
"""Warps of a tile's program with and without conversion by hardware; integer rounding spills registers in 16."""
_MAX: tl.constexpr = tl.constexpr(E4M3_MAX)
_MIN: tl.constexpr = tl.constexpr(MIN_MAGNITUDE)


def quantize_blocks(
    weight: Tensor, block: int, *, warps: int | None = None, hardware: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Return torch_path.quantize_blocks, bitwise.

    warps     number of warps per tile; None takes TILE_WARPS.
    hardware  rounds by the GPU's own conversion; None if it has one.
    Raises ValueError if rows are so long or so far apart that the offsets in a tile exceed int32.
    """
    rows, columns = weight.shape
    longest = max(weight.stride(0), columns)
    if longest * block >= 2**31:
        raise ValueError(
            f"rows of weight are {longest} elements long or apart, but tiles of {block} take fewer than "
            f"{2**31 // block}; quantise a part of the columns at a time, made contiguous"
        )
    hardware = converts_to_e4m3() if hardware is None else hardware
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(triton.cdiv(rows, block), triton.cdiv(columns, block), device=weight.device)
    quantize_blocks_kernel[(scales.numel(),)](
        weight,
        weight.stride(0),
        codes,
        scales,
        rows,
        columns,
        scales.shape[1],
        BLOCK=block,
        HARDWARE=hardware,
        num_warps=warps or TILE_WARPS[hardware],
    )
    return codes.view(torch.float8_e4m3fn), scales


def quantize_rows(x: Tensor, *, hardware: bool | None = None) -> tuple[Tensor, Tensor]:
    """Return torch_path.quantize_rows, bitwise. `hardware` as in quantize_blocks."""
    rows, columns = x.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=x.device)
    scales = torch.empty(rows, 1, device=x.device)
    block = min(ROW_BLOCK, triton.next_power_of_2(columns))
    hardware = converts_to_e4m3() if hardware is None else hardware
    quantize_rows_kernel[(rows,)](x, x.stride(0), codes, scales, columns, BLOCK=block, HARDWARE=hardware, num_warps=4)
    return codes.view(torch.float8_e4m3fn), scales


def converts_to_e4m3() -> bool:
    """Return True if kernels are compiled for a GPU that converts fp32 to e4m3 itself."""
    if INTERPRETED:
        return False
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 89


@triton.jit
def quantize_blocks_kernel(
    weight_ptr,
    row_stride,
    codes_ptr,
    scales_ptr,
    num_rows,
    num_columns,
    tiles_across,
    BLOCK: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    tile = tl.program_id(0)
    first_row, first_column = tile // tiles_across * BLOCK, tile % tiles_across * BLOCK
    # A matrix may hold more than 2^31 elements, so a tile's start is int64. Offsets inside it are int32: fewer registers.
    weight_ptr += first_row.to(tl.int64) * row_stride + first_column
    codes_ptr += first_row.to(tl.int64) * num_columns + first_column
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (rows < num_rows - first_row) & (columns < num_columns - first_column)
    x = tl.load(weight_ptr + rows * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.max(_magnitude_bits(x), 1), 0)
    factor, scale, broken = _scales(largest)
    codes = _codes(x * factor, broken, HARDWARE)  # before the addresses, which would take registers meanwhile
    tl.store(codes_ptr + rows * num_columns + columns, codes, mask=inside)
    tl.store(scales_ptr + tile, scale)


@triton.jit
def quantize_rows_kernel(
    x_ptr, row_stride, codes_ptr, scales_ptr, num_columns, BLOCK: tl.constexpr, HARDWARE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * row_stride + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, _magnitude_bits(x))
    factor, scale, broken = _scales(tl.max(largest, 0))
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < num_columns
        x = tl.load(x_ptr + row * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
        codes = _codes(x * factor, broken, HARDWARE)
        tl.store(codes_ptr + row * num_columns + columns, codes, mask=inside)
    tl.store(scales_ptr + row, scale)


@triton.jit
def _magnitude_bits(x):
    """Return an int32 that orders like |x|, with infinity and NaN as the largest."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scales(largest_bits):
    """Return the factor to multiply by, the scale to store, and True if the group holds an infinity or NaN."""
    broken = largest_bits >= 0x7F800000
    bounded = tl.maximum(largest_bits.to(tl.float32, bitcast=True), _MIN)
    # A plain division is approximate on a GPU.
    factor = tl.div_rn(_MAX, bounded)
    scale = tl.div_rn(bounded, _MAX)
    return factor, tl.where(broken, float("nan"), scale), broken


@triton.jit
def _codes(x, broken, HARDWARE: tl.constexpr):
    """Return the e4m3 codes of `x` as uint8, all NaN for a broken group."""
    if HARDWARE:
        codes = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        codes = _e4m3_codes(x)
    return tl.where(broken, 0x7F, codes).to(tl.uint8)


@triton.jit
def _e4m3_codes(x):
    """Return torch_path.e4m3_codes. Meaningless for a broken group, whose codes the caller overwrites."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    exponent = magnitude >> 23
    subnormal = exponent < 121
    shift = tl.where(subnormal, tl.minimum(141 - exponent, 25), 20)
    significand = tl.where(subnormal, (magnitude & 0x7FFFFF) | 0x800000, magnitude)
    half_and_parity = (1 << (shift - 1)) - 1 + ((significand >> shift) & 1)
    code = (significand + half_and_parity) >> shift
    code = tl.where(subnormal, code, code - 960)
    return code | ((bits >> 24) & 0x80)
