"""SwiGLU in Triton against fp64: compiled on a GPU, otherwise in Triton's interpreter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.kernels.swiglu.reference import exact, fp32_errors, problem
from tests.kernels.triton_here import DEVICE, UNAVAILABLE

if UNAVAILABLE:
    pytest.skip(UNAVAILABLE, allow_module_level=True)
from dapo_mcore.kernels.swiglu import choose, kernel, swiglu, torch_path

CPU = DEVICE == "cpu"
# half the distance of two numbers; the interpreter cuts bf16 off instead of rounding it
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0 ** -(7 if CPU else 8)}
SMALLEST = {torch.float32: 1e-37, torch.float16: 2.0**-24, torch.bfloat16: 1e-37}


def check(x, weights, grad, found) -> None:
    expected, errors = exact(x, weights, grad), fp32_errors(x, weights, grad)
    assert len(found) == len(expected)
    for ours, right, error in zip(found, expected, errors):
        tolerance = error + ROUNDING[ours.dtype] * (right.abs() + error) + SMALLEST[ours.dtype]
        assert ((ours.double().cpu() - right).abs() <= tolerance).all()


def run(x, weights, grad):
    grads = kernel.backward(grad, x, weights)
    return kernel.forward(x, weights), *(g for g in grads if g is not None)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (3, 64), (2, 2500)], ids=str)
def test_outputs_and_gradients_are_rounded_once(shape, dtype, weighted):
    x, weights, grad = problem(*shape, dtype, DEVICE)
    found = run(x, weights if weighted else None, grad)
    check(x, weights if weighted else None, grad, found)
    assert [t.dtype for t in found] == [dtype, dtype, torch.float32][: 2 + weighted]


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_strided_rows_and_gradients_and_narrow_weights(weight_dtype):
    x, weights, grad = problem(6, 40, torch.float32, DEVICE)
    wide = torch.full((6, 100), torch.nan, device=DEVICE)
    wide[:, 7:87] = x
    weights = weights.to(weight_dtype).expand(6, 2)[:, 1:]
    for some in (grad.t().contiguous().t(), torch.cat([grad, grad], 1)[:, :40], grad[:1].expand(6, 40)):
        found = run(wide[:, 7:87], weights, some)
        check(x, weights, some, found)
    assert all(t.is_contiguous() for t in found)


def test_gates_beyond_exp_and_not_finite_ones():
    x = torch.tensor([[-200.0, 200.0, torch.nan, -3e38, 2.0, 3.0, 4.0, 5.0]], device=DEVICE)
    y, grad_x = run(x, None, torch.ones(1, 4, device=DEVICE))
    assert y.nan_to_num(7).tolist() == [[0.0, 600.0, 7.0, 0.0]]
    assert grad_x.nan_to_num(7).tolist() == [[0.0, 3.0, 7.0, 0.0, 0.0, 200.0, 7.0, 0.0]]


def test_no_tokens():
    x, weights, grad = problem(0, 8, torch.bfloat16, DEVICE)
    y, grad_x, grad_weights = run(x, weights, grad)
    assert (y.shape, grad_x.shape, grad_weights.shape) == ((0, 8), (0, 16), (0, 1))


def test_autograd_runs_the_kernel(monkeypatch):
    monkeypatch.setattr("dapo_mcore.kernels.swiglu.choose", lambda x: kernel)
    x, weights, grad = problem(5, 20, torch.float32, DEVICE)
    y = swiglu(x.requires_grad_(), weights.requires_grad_())
    y.backward(grad)
    check(x.detach(), weights.detach(), grad, (y.detach(), x.grad, weights.grad))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gpu_takes_the_kernel_and_a_cpu_the_torch_path(dtype):
    assert choose(SimpleNamespace(is_cuda=True, dtype=dtype)) is kernel
    assert choose(SimpleNamespace(is_cuda=True, dtype=torch.float64)) is torch_path
    assert choose(SimpleNamespace(is_cuda=False, dtype=dtype)) is torch_path


@pytest.mark.gpu
@pytest.mark.skipif(CPU, reason="needs a GPU")
def test_a_gpu_runs_the_kernel_and_reaches_elements_beyond_2_to_the_31():
    x = torch.zeros(2**17, 2**14 + 256, dtype=torch.bfloat16, device=DEVICE)  # 2.2e9 elements
    x[-1] = 1.0
    y = swiglu(x.requires_grad_(), None)
    y[-1].float().sum().backward()
    assert type(y.grad_fn).__name__ == "SwiGLUBackward" and y[-1].eq(y[-1, 0]).all() and y[-1, 0] > 0.7
    assert x.grad[-1].ne(0).all() and not x.grad[:-1].any()
