"""FP8 quantisation in PyTorch: the rounding of every bf16 and fp16 number, the scales, and the errors."""

from __future__ import annotations

import math

import pytest
import torch
from dapo_mcore.kernels.fp8_quant import dequantize_blocks, dequantize_rows, quantize_blocks, quantize_rows
from dapo_mcore.kernels.fp8_quant.torch_path import e4m3_codes

FP8 = torch.float8_e4m3fn


def every(dtype: torch.dtype) -> torch.Tensor:
    """Return all numbers of a 16-bit dtype up to 464, the last that rounds to 448, as fp32."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    return x[x.abs() <= 464]


def values() -> torch.Tensor:
    """Return the 127 non-negative finite e4m3 numbers in order, fp64: steps of 2^-9 up to 2^-6, then 8 per binade to 448."""
    exponent, mantissa = torch.arange(127) // 8, torch.arange(127) % 8
    steps = torch.where(exponent == 0, mantissa, 8 + mantissa).double()
    return steps * 2.0 ** (exponent.clamp(min=1) - 10).double()


def ties() -> torch.Tensor:
    """Return every midpoint between neighbours, and the fp32 numbers just below and above it, both signs."""
    middle = ((values()[1:] + values()[:-1]) / 2).float()  # exact: one bit more than e4m3's
    near = [middle, torch.nextafter(middle, middle.new_tensor(0.0)), torch.nextafter(middle, middle.new_tensor(500.0))]
    positive = torch.cat(near)
    return torch.cat([positive, -positive])


@pytest.mark.parametrize("x", [every(torch.bfloat16), every(torch.float16), ties()], ids=["bf16", "fp16", "ties"])
def test_codes_are_those_of_torch_s_cast(x):
    assert torch.equal(e4m3_codes(x), x.to(FP8).view(torch.uint8))


@pytest.mark.parametrize("x", [every(torch.bfloat16), every(torch.float16), ties()], ids=["bf16", "fp16", "ties"])
def test_codes_are_the_nearest_number_and_the_even_one_of_two(x):
    """The reference is a search in fp64 over the list of e4m3 numbers."""
    distance = (x.abs().double()[:, None] - values()).abs()  # [n, 127]
    nearest = distance == distance.amin(1, keepdim=True)
    even = torch.arange(127) % 2 == 0
    best = torch.where(nearest.sum(1) == 2, (nearest & even).int().argmax(1), nearest.int().argmax(1))
    assert torch.equal(e4m3_codes(x), (best + 128 * x.signbit()).to(torch.uint8))


def test_every_e4m3_number_keeps_its_code():
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes & 0x7F != 0x7F]  # without NaN
    assert torch.equal(e4m3_codes(codes.view(FP8).float()), codes)


def test_a_tile_by_hand():
    """Largest magnitude 896: scale 2. Scaled: 448, 0.5, -18 and 17; 17 is midway between 16 and 18, and 16 is even."""
    weight = torch.tensor([[896.0, 1.0], [-36.0, 34.0]], dtype=torch.bfloat16)
    quantized, scale_inv = quantize_blocks(weight)
    assert quantized.dtype == FP8 and quantized.float().tolist() == [[448.0, 0.5], [-18.0, 16.0]]
    assert scale_inv.tolist() == [[2.0]]
    assert dequantize_blocks(quantized, scale_inv).tolist() == [[896.0, 1.0], [-36.0, 32.0]]


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (130, 257), (63, 1000), (256, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scale_and_error_of_a_tile_follow_from_its_own_maximum(shape, dtype):
    g = torch.Generator().manual_seed(0)
    weight = (torch.randn(shape, generator=g) * torch.randn(shape, generator=g).exp()).to(dtype)
    quantized, scale_inv = quantize_blocks(weight)
    assert quantized.shape == shape and scale_inv.shape == (math.ceil(shape[0] / 128), math.ceil(shape[1] / 128))
    assert quantized.is_contiguous() and scale_inv.dtype == torch.float32
    back = dequantize_blocks(quantized, scale_inv)
    for i, j in torch.cartesian_prod(*map(torch.arange, scale_inv.shape)).reshape(-1, 2).tolist():
        tile = (slice(i * 128, i * 128 + 128), slice(j * 128, j * 128 + 128))
        exact, scale = weight[tile].double(), scale_inv[i, j].item()
        assert scale == pytest.approx(exact.abs().max().item() / 448, rel=1e-7)
        assert quantized[tile].float().abs().max() == 448
        bound = (exact.abs() / 16).clamp(min=scale / 1024) * (1 + 1e-6)
        assert ((back[tile] - exact).abs() <= bound).all()


def test_rows_are_tiles_of_one_row():
    x = torch.randn(5, 300, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
    quantized, scale_inv = quantize_rows(x)
    assert scale_inv.shape == (5, 1)
    torch.testing.assert_close(scale_inv[:, 0], x.float().abs().amax(1) / 448, rtol=0, atol=0)
    assert torch.equal(
        quantized.view(torch.uint8), e4m3_codes(x.float() * (torch.tensor(448.0) / x.float().abs().amax(1))[:, None])
    )
    back = dequantize_rows(quantized, scale_inv, torch.bfloat16)
    assert back.dtype == torch.bfloat16 and ((back - x).abs() <= x.abs() / 15 + scale_inv / 1000).all()


def test_a_smaller_block_gives_every_tile_its_scale():
    weight = torch.ones(32, 48)
    weight[16:, 16:32] = 3.0
    quantized, scale_inv = quantize_blocks(weight, 16)
    assert torch.equal(scale_inv, torch.tensor([[1, 1, 1], [1, 3, 1]]) / torch.tensor(448.0))
    torch.testing.assert_close(dequantize_blocks(quantized, scale_inv, 16), weight, rtol=1e-6, atol=0)


def test_zeros_and_the_smallest_numbers_keep_finite_scales():
    quantized, scale_inv = quantize_rows(torch.tensor([[0.0, -0.0], [1e-45, 0.0], [2.0**-126, -(2.0**-130)]]))
    assert scale_inv.flatten().tolist() == [2.0**-126] * 3
    assert quantized.float().tolist() == [[0, 0], [0, 0], [1, -0.0625]]
    assert quantized.view(torch.uint8)[0].tolist() == [0, 0x80], "the sign of zero stays"


def test_the_largest_numbers_do_not_overflow():
    top = torch.finfo(torch.float32).max
    quantized, scale_inv = quantize_rows(torch.tensor([[top, -top, top / 2]]))
    assert quantized.float().tolist() == [[448, -448, 224]] and dequantize_rows(quantized, scale_inv).isfinite().all()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_broken_weight_breaks_its_tile_and_no_other(bad):
    weight = torch.ones(4, 256, dtype=torch.bfloat16)
    weight[1, 7] = bad
    quantized, scale_inv = quantize_blocks(weight)
    assert scale_inv.isnan().tolist() == [[True, False]]
    assert quantized.view(torch.uint8)[:, :128].eq(0x7F).all() and quantized[:, 128:].float().eq(448).all()
    assert dequantize_blocks(quantized, scale_inv).isnan().sum() == 4 * 128


def test_rows_may_be_strided():
    whole = torch.randn(6, 40, generator=torch.Generator().manual_seed(2))
    for quantize in (quantize_blocks, quantize_rows):
        for ours, expected in zip(quantize(whole[:, 8:32]), quantize(whole[:, 8:32].contiguous())):
            assert torch.equal(ours.float(), expected.float())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_blocks(torch.zeros(2, 3).t()), r"weight has strides \[1, 3\].*\.contiguous"),
        (lambda: quantize_rows(torch.zeros(2, 3).t()), r"x has strides \[1, 3\]"),
        (lambda: quantize_blocks(torch.zeros(2, 3, 4)), r"weight must be \[N, K\].*got \[2, 3, 4\] in torch.float32"),
        (lambda: quantize_blocks(torch.zeros(0, 3)), r"both at least 1.*got \[0, 3\]"),
        (lambda: quantize_rows(torch.zeros(2, 3).double()), "got .* in torch.float64"),
        (lambda: quantize_blocks(torch.zeros(2, 3), 100), "block 100 must be one of 16, 32, 64, 128"),
        (lambda: dequantize_blocks(torch.zeros(2, 3), torch.ones(1, 1)), "must be float8_e4m3fn"),
        (
            lambda: dequantize_blocks(torch.zeros(2, 129).to(FP8), torch.ones(1, 1)),
            r"float32 \[1, 2\] for .*\[2, 129\]",
        ),
        (
            lambda: dequantize_rows(torch.zeros(2, 3).to(FP8), torch.ones(2)),
            r"float32 \[2, 1\].*got torch.float32 \[2\]",
        ),
    ],
)
def test_wrong_arguments_raise_errors_that_explain(call, message):
    with pytest.raises(ValueError, match=message):
        call()
