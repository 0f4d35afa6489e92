"""FP8 quantisation in Triton equals PyTorch bitwise: compiled on a GPU, otherwise in Triton's interpreter."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from dapo_mcore.kernels.fp8_quant import quantize_blocks, quantize_rows, torch_path

pytest.importorskip("triton")
from dapo_mcore.kernels.fp8_quant import kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def same_bits(ours, expected) -> bool:
    """Return True if codes and scales are equal; any NaN scale equals any other."""
    codes, scales = ours[0].view(torch.uint8).cpu(), ours[1].cpu()
    expected_codes, expected_scales = expected[0].view(torch.uint8).cpu(), expected[1].cpu()
    return torch.equal(codes, expected_codes) and torch.equal(scales.nan_to_num(-1), expected_scales.nan_to_num(-1))


def every(dtype: torch.dtype) -> torch.Tensor:
    """Return [32, n]: all numbers of a 16-bit dtype up to 448. Each row also holds 448, so its scale is exactly 1.

    bf16's subnormals are left out: Triton's interpreter reads them wrongly. They would round to 0.
    """
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[(x.abs() <= 448) & ((x == 0) | (x.abs() >= 2.0**-126))]
    x = torch.cat([x, x.new_zeros(-len(x) % 32)]).view(32, -1)
    return torch.cat([x.new_full((32, 1), 448), x], 1)


def ragged(rows: int, columns: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=g) * torch.randn(rows, columns, generator=g).exp()


@pytest.mark.parametrize("hardware", sorted({False, kernel.converts_to_e4m3()}))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_rounds_as_in_the_torch_path(dtype, hardware):
    x = every(dtype)
    assert same_bits(kernel.quantize_rows(x.to(DEVICE), hardware=hardware), torch_path.quantize_rows(x))


@pytest.mark.parametrize("shape", [(1, 1), (70, 33), (3, 2500)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ragged_rows(shape, dtype):
    x = ragged(*shape).to(dtype)
    assert same_bits(kernel.quantize_rows(x.to(DEVICE)), torch_path.quantize_rows(x))


@pytest.mark.parametrize(("shape", "block"), [((1, 1), 128), ((130, 140), 128), ((50, 70), 32)], ids=str)
def test_ragged_tiles(shape, block):
    x = ragged(*shape).to(torch.bfloat16)
    assert same_bits(kernel.quantize_blocks(x.to(DEVICE), block), torch_path.quantize_blocks(x, block))


def test_strided_rows():
    x = ragged(20, 90)[:, 10:57].to(DEVICE)
    assert same_bits(kernel.quantize_rows(x), torch_path.quantize_rows(x))
    assert same_bits(kernel.quantize_blocks(x, 16), torch_path.quantize_blocks(x, 16))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_broken_weight_breaks_its_group_and_no_other(bad):
    x = ragged(20, 40)
    x[3, 17] = bad
    for ours, expected in (
        (kernel.quantize_rows(x.to(DEVICE)), torch_path.quantize_rows(x)),
        (kernel.quantize_blocks(x.to(DEVICE), 16), torch_path.quantize_blocks(x, 16)),
    ):
        assert same_bits(ours, expected)
        assert ours[1].isnan().sum() == 1


def test_zeros_and_both_ends_of_fp32():
    x = torch.tensor([[0.0, -0.0, 0.0], [3e38, -1e-45, 1.0], [1e-45, 0.0, 0.0], [2.0**-126, -(2.0**-130), 2.0**-137]])
    assert same_bits(kernel.quantize_rows(x.to(DEVICE)), torch_path.quantize_rows(x))


@pytest.mark.parametrize(("arch", "expected"), [(80, False), (89, True), (90, True)])
def test_gpus_from_8_9_on_round_themselves(monkeypatch, arch, expected):
    active = SimpleNamespace(get_current_target=lambda: SimpleNamespace(backend="cuda", arch=arch))
    monkeypatch.setattr(
        kernel, "triton", SimpleNamespace(runtime=SimpleNamespace(driver=SimpleNamespace(active=active)))
    )
    monkeypatch.setattr(kernel, "INTERPRETED", False)
    assert kernel.converts_to_e4m3() is expected
    monkeypatch.setattr(kernel, "INTERPRETED", True)
    assert not kernel.converts_to_e4m3()


def test_rows_too_far_apart_for_offsets_of_32_bits_are_refused():
    far = torch.empty_strided((2, 4), (2**24, 1), device="meta")
    with pytest.raises(ValueError, match="16777216 elements long or apart, but tiles of 128 take fewer than 16777216"):
        kernel.quantize_blocks(far, 128)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_runs_the_kernel_and_gives_the_bits_of_the_cpu():
    x = ragged(1000, 1003).to(torch.bfloat16)
    for quantize in (quantize_blocks, quantize_rows):
        assert same_bits(quantize(x.cuda()), quantize(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_elements_beyond_2_to_the_31_are_reached():
    x = torch.zeros(2**20, 2**11 + 128, dtype=torch.bfloat16, device="cuda")  # 2.3e9 elements
    x[-1, -1] = 448.0
    quantized, scale_inv = quantize_blocks(x)
    assert quantized[-1, -1].float() == 448 and scale_inv[-1, -1] == 1
    assert scale_inv[:-1].eq(2.0**-126).all()
