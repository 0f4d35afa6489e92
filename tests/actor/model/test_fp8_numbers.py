"""Codes and scales of the FP8 recipes: by hand, and against a search for the nearest value in a table, in fp64."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from dapo_mcore.actor.model.fp8_numbers import cast, quantize_mx, quantize_tensor, quantize_tiles

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
INF, NAN = math.inf, math.nan


def table(dtype: torch.dtype) -> list[tuple[float, int]]:
    """Return (value, code) of all finite codes from 0 up, from the definition of the format."""
    mantissa_bits, bias, top = (3, 7, 0x7E) if dtype == E4M3 else (2, 15, 0x7B)
    steps = 1 << mantissa_bits
    rows = []
    for code in range(top + 1):
        exponent, mantissa = divmod(code, steps)
        if exponent:
            rows.append(((1 + mantissa / steps) * 2.0 ** (exponent - bias), code))
        else:
            rows.append((mantissa / steps * 2.0 ** (1 - bias), code))
    return rows


def nearest(value: float, dtype: torch.dtype) -> int:
    """Return the code of the nearest value, of two equally near ones the even code."""
    best = min(table(dtype), key=lambda row: (abs(row[0] - abs(value)), row[1] & 1))
    return best[1] | (0x80 if math.copysign(1.0, value) < 0 else 0)


def codes(values: torch.Tensor) -> list[int]:
    return values.view(torch.uint8).flatten().tolist()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_a_cast_rounds_to_the_nearest_value_with_ties_to_even(dtype):
    grid = [value for value, _ in table(dtype)]
    between = [(a + b) / 2 for a, b in pairwise(grid)]
    values = torch.tensor([*grid, *between, *(-value for value in grid + between)])
    assert codes(cast(values, dtype)) == [nearest(value, dtype) for value in values.tolist()]


def test_a_cast_saturates_finite_and_infinite_values_and_keeps_nan():
    values = cast(torch.tensor([448.0, 464.0, 1e9, INF, -INF, NAN]), E4M3).float().tolist()
    assert values[:5] == [448.0, 448.0, 448.0, 448.0, -448.0] and math.isnan(values[5])
    assert cast(torch.tensor([57344.0, 1e9, -INF]), E5M2).float().tolist() == [57344.0, 57344.0, -57344.0]


@pytest.mark.parametrize(
    ("values", "expected_codes", "factor"),
    [
        ([7.0, -3.5, 0.0], [448.0, -224.0, 0.0], 1 / 64),  # 448 / 7 = 64
        ([0.0, -0.0, 0.0], [0.0, -0.0, 0.0], 1.0),
        ([INF, 3.0, 1.0], [448.0, 3.0, 1.0], 1.0),
        ([1e-38, 0.0, -1e-38], [None, 0.0, None], 1 / torch.finfo(torch.float32).max),  # 448 / 1e-38 overflows
    ],
)
def test_a_tensor_has_one_scale_from_its_largest_magnitude(values, expected_codes, factor):
    found = quantize_tensor(torch.tensor([values]), E4M3)
    assert found.factors.tolist() == [[torch.tensor(factor).item()]]
    for code, expected in zip(found.codes.float()[0].tolist(), expected_codes):
        assert expected is None or (code == expected and math.copysign(1, code) == math.copysign(1, expected))


def test_a_scale_is_the_ieee_quotient():
    for largest in np.linspace(0.1, 9, 50, dtype=np.float32):
        scale = np.float32(448) / largest
        assert quantize_tensor(torch.tensor([[largest]]), E4M3).factors.item() == np.float32(1) / scale


def test_a_nan_leaves_the_scale_at_1_and_stays():
    found = quantize_tensor(torch.tensor([[NAN, 300.0]]), E4M3)
    assert found.factors.tolist() == [[1.0]]
    assert found.values()[0].isnan().tolist() == [True, False]
    assert found.values()[0, 1] == 288.0  # 300 is nearer to 288 than to 320


def test_tiles_have_scales_of_their_own_rounded_down_to_a_power_of_two():
    matrix = torch.tensor([[3.0, 1.0, 0.0, 0.5], [-1.0, 2.0, 0.25, 1.0], [100.0, 0.0, 0.0, 0.0]])
    found = quantize_tiles(matrix, E4M3, (2, 2))
    # 448/3 = 149.3 → 128, 448/1 = 448 → 256; at the edge 448/100 = 4.48 → 4, and 1 for zeros
    assert found.factors.tolist() == [[1 / 128, 1 / 256], [1 / 4, 1.0]]
    expected = [
        [384.0, 128.0, 0.0, 128.0],
        [-128.0, 256.0, 64.0, 256.0],
        [384.0, 0.0, 0.0, 0.0],
    ]  # 400 is a tie: to even
    assert found.codes.float().tolist() == expected
    exact = quantize_tiles(matrix, E4M3, (2, 2), power_of_two=False)
    assert exact.factors[0, 0].item() == np.float32(1) / (np.float32(448) / np.float32(3))


def test_an_infinite_scale_of_a_tile_is_the_largest_value_of_the_dtype():
    found = quantize_tiles(torch.full((1, 4), 1e-37, dtype=torch.bfloat16), E4M3, (1, 4), power_of_two=False)
    assert found.factors.item() == (1 / torch.tensor(torch.finfo(torch.bfloat16).max)).item()


@pytest.mark.parametrize(
    ("largest", "exponent"),
    [
        (448.0, 127),  # 2^0 holds it
        (449.0, 128),
        (224.0, 126),
        (1.0, 119),  # 1/448 = 2^-8.8 → 2^-8
        (0.0, 0),
    ],
)
def test_an_mx_scale_is_the_next_power_of_two(largest, exponent):
    matrix = torch.zeros(1, 32)
    matrix[0, 5] = largest
    found = quantize_mx(matrix, E4M3, (1, 32))
    assert found.factors.item() == (0.0 if exponent == 0 else 2.0 ** (exponent - 127))
    assert found.values()[0, 5] == (largest if largest != 449.0 else 448.0)


def test_an_infinity_or_nan_spoils_its_own_mx_tile_only():
    matrix = torch.ones(2, 64)
    matrix[0, 3], matrix[1, 40] = NAN, INF
    values = quantize_mx(matrix, E4M3, (1, 32)).values()
    assert values[0, :32].isnan().all() and not values[0, 32:].isnan().any()
    assert (values[0, 32:] == 1).all() and (values[1, :32] == 1).all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("tile", [(1, 8), (8, 1), (8, 8), (5, 7)])
def test_every_code_is_the_nearest_one_at_the_scale_of_its_tile(tile, dtype):
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(13, 19, generator=generator) * torch.logspace(-3, 3, 19)
    found = quantize_tiles(matrix, dtype, tile)
    for row in range(13):
        for column in range(19):
            top, left = row // tile[0] * tile[0], column // tile[1] * tile[1]
            largest = matrix[top : top + tile[0], left : left + tile[1]].abs().max().item()
            scale = 2.0 ** math.floor(math.log2(torch.finfo(dtype).max / largest))
            expected = nearest(matrix[row, column].item() * scale, dtype)
            assert found.codes.view(torch.uint8)[row, column] == expected
            assert found.factors[row // tile[0], column // tile[1]] == 1 / scale
