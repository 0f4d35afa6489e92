"""Codes and scales of the FP8 recipes, bit for bit as Transformer Engine makes them.

Change here: how a matrix is quantized. Source: Transformer Engine v2.11; the files are below transformer_engine/common:
recipe/recipe_common.cuh (scales), recipe/current_scaling.cu (per tensor), transpose/quantize_transpose_*_blockwise.cu
(tiles), cast/mxfp8/quantize_mxfp8.cuh and util/ptx.cuh (MXFP8).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

_EXPONENT_BITS = 0x7F800000
_MANTISSA_BITS = 0x007FFFFF
_LARGEST_FP32 = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Quantized:
    """A matrix in FP8.

    codes    float8 [M, N].
    factors  float32, one per tile of a grid over the matrix; a value is its code times the factor of its tile.
    tile     rows and columns of a tile.
    """

    codes: torch.Tensor
    factors: torch.Tensor
    tile: tuple[int, int]

    def values(self) -> torch.Tensor:
        """Return the represented matrix, float32 [M, N]."""
        return self.codes.float() * _expand(self.factors, self.tile, self.codes.shape)


def quantize_tensor(matrix: torch.Tensor, dtype: torch.dtype, *, power_of_two: bool = False) -> Quantized:
    """Quantize a matrix [M, N] with one scale, from its largest magnitude (current scaling, recipe `tensorwise`)."""
    whole = (max(matrix.size(0), 1), max(matrix.size(1), 1))
    scales = _scales(_largest(matrix, whole), dtype, if_infinite=_LARGEST_FP32, power_of_two=power_of_two)
    return _quantize(matrix, dtype, whole, scales, scales.reciprocal())


def quantize_tiles(
    matrix: torch.Tensor, dtype: torch.dtype, tile: tuple[int, int], *, power_of_two: bool = True
) -> Quantized:
    """Quantize a matrix [M, N] with one scale per tile (recipe `blockwise`). A tile at an edge may be smaller."""
    if_infinite = torch.finfo(matrix.dtype).max
    scales = _scales(_largest(matrix, tile), dtype, if_infinite=if_infinite, power_of_two=power_of_two)
    return _quantize(matrix, dtype, tile, scales, scales.reciprocal())


def quantize_mx(matrix: torch.Tensor, dtype: torch.dtype, tile: tuple[int, int]) -> Quantized:
    """Quantize a matrix [M, N] with one E8M0 scale (a power of two) per tile: (1, 32) or (32, 1) (recipe `mxfp8`)."""
    exponents = _e8m0(_largest(matrix, tile) * torch.tensor(1.0 / torch.finfo(dtype).max))
    scales = torch.where(exponents == 0, 1.0, torch.exp2(127.0 - exponents))
    factors = torch.where(exponents == 0, 0.0, torch.exp2(exponents - 127.0))
    return _quantize(matrix, dtype, tile, scales, factors.masked_fill(exponents == 255, torch.nan))


def cast(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round float32 values to the nearest FP8 value, ties to even. Finite values and infinities saturate; NaN stays.

    torch's own conversion does not saturate on a CPU.
    """
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype)


def _quantize(
    matrix: torch.Tensor, dtype: torch.dtype, tile: tuple[int, int], scales: torch.Tensor, factors: torch.Tensor
) -> Quantized:
    return Quantized(cast(matrix.float() * _expand(scales, tile, matrix.shape), dtype), factors, tile)


def _largest(matrix: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    """Return the largest magnitude of each tile, float32 [ceil(M / rows), ceil(N / columns)]."""
    rows, columns = tile
    missing = (0, -matrix.size(1) % columns, 0, -matrix.size(0) % rows)
    padded = functional.pad(matrix.detach().abs().float(), missing)
    return padded.view(padded.size(0) // rows, rows, padded.size(1) // columns, columns).amax(dim=(1, 3))


def _scales(largest: torch.Tensor, dtype: torch.dtype, *, if_infinite: float, power_of_two: bool) -> torch.Tensor:
    """Return what values are multiplied by, float32: FP8's largest value over the magnitude. 1 for magnitudes 0, inf and NaN.

    power_of_two  round the scale down to a power of two; the scaled values still fit.
    """
    scales = (
        torch.tensor(torch.finfo(dtype).max) / largest
    )  # torch divides a Python number by multiplying with the reciprocal
    scales = torch.where(scales.isinf(), if_infinite, scales)
    if power_of_two:
        scales = (scales.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    return torch.where((largest == 0) | ~largest.isfinite(), 1.0, scales)


def _e8m0(values: torch.Tensor) -> torch.Tensor:
    """Return the biased exponents of the next powers of two at or above `values` (float32, at least 0), as int32.

    0 for values too small for E8M0, 254 for infinity, 255 for NaN.
    """
    bits = values.view(torch.int32)
    exponents, mantissas = (bits & _EXPONENT_BITS) >> 23, bits & _MANTISSA_BITS
    rounds_up = (mantissas > 0) & (exponents != 254) & ~((exponents == 0) & (mantissas <= 0x400000))
    exponents = exponents + rounds_up.int()
    return exponents.masked_fill(values.isinf(), 254).masked_fill(values.isnan(), 255)


def _expand(per_tile: torch.Tensor, tile: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """Return the value of each element's tile, [M, N]."""
    repeated = per_tile.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)
    return repeated[: shape[0], : shape[1]]
