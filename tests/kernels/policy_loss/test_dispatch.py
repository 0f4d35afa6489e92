"""Which implementation runs where, and the errors when the requested one cannot run."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from dapo_mcore.kernels.policy_loss import dispatch, torch_path

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")


class OnGPU:
    """Attributes of a tensor on a GPU that the rule reads."""

    is_cuda, is_cpu = True, False

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype


def test_the_cpu_runs_pytorch():
    assert dispatch.choose("auto", torch.zeros(1)) is torch_path


@needs_triton
def test_a_gpu_runs_triton_and_for_fp64_pytorch():
    for dtype in (torch.float32, torch.bfloat16):
        assert dispatch.choose("auto", OnGPU(dtype)).__name__.endswith("policy_loss.kernel")
        assert dispatch.choose("torch", OnGPU(dtype)) is torch_path
    assert dispatch.choose("auto", OnGPU(torch.float64)) is torch_path


def test_without_triton_all_but_triton_works(monkeypatch):
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    assert dispatch.choose("auto", OnGPU(torch.float32)) is torch_path
    with pytest.raises(ValueError, match="pip install triton"):
        dispatch.choose("triton", torch.zeros(1))


@needs_triton
def test_triton_refuses_what_it_cannot_compute(monkeypatch):
    from dapo_mcore.kernels.policy_loss import kernel

    with pytest.raises(ValueError, match=r"got torch\.float64; use 'torch'"):
        dispatch.choose("triton", torch.zeros(1).double())
    monkeypatch.setattr(kernel, "INTERPRETED", False)
    with pytest.raises(ValueError, match="set TRITON_INTERPRET=1"):
        dispatch.choose("triton", torch.zeros(1))
    with pytest.raises(ValueError, match="'cuda' is unknown"):
        dispatch.choose("cuda", torch.zeros(1))
