"""Matrix products with bf16 operands and an fp32 result: the fallback on a CPU, and in-place addition on a GPU.

Without a GPU this does not show that torch's CUDA library accepts these calls.
"""

from __future__ import annotations

import pytest
import torch
from dapo_mcore.kernels.policy_head import products

from tests.kernels.policy_head.exact import relative_error


def test_a_cpu_cannot_add_in_place():
    assert not products.adds_in_place(torch.device("cpu"), torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_product_is_added_in_place_with_its_factor(dtype):
    a, b, total = (torch.randn(*shape, dtype=dtype) for shape in ((5, 7), (7, 3), (5, 3)))
    expected, memory = total + 0.25 * (a @ b), total.data_ptr()
    products.add_product(total, a, b, 0.25)
    torch.testing.assert_close(total, expected)
    assert total.data_ptr() == memory


def test_on_the_cpu_bf16_operands_are_widened_and_others_are_not_copied():
    narrow, wide = torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(2, 3)
    assert all(x.dtype == torch.float32 for x in products.wide_operands(narrow, narrow))
    assert all(x is wide for x in products.wide_operands(wide, wide))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnAGPU:
    """bf16 operands, fp32 results; the gradient to logits is laid out as the kernels write it: rows of 2V, V of them used."""

    @pytest.mark.parametrize("vocab", [1, 1003, 4096])
    @pytest.mark.parametrize("tokens", [1, 63, 256])
    def test_products_are_those_of_fp64(self, tokens, vocab):
        from dapo_mcore.kernels.policy_loss.kernel import gradient_view

        grad = gradient_view(torch.empty(tokens, vocab, device="cuda"), torch.bfloat16)
        grad.copy_(torch.randn(tokens, vocab))
        hidden, weight = (torch.randn(n, 80, device="cuda", dtype=torch.bfloat16) for n in (tokens, vocab))
        logits = products.product(hidden, weight.t(), torch.float32)
        assert logits.dtype == torch.float32
        assert relative_error(logits, hidden.double() @ weight.double().t()) < 1e-6
        assert relative_error(torch.mm(grad, weight), grad.double() @ weight.double()) < 4e-3
        total = torch.randn(vocab, 80, device="cuda")
        expected = total.double() + 0.5 * (grad.double().t() @ hidden.double())
        products.add_product(total, grad.t(), hidden, 0.5)
        assert relative_error(total, expected) < 1e-6

    def test_adding_in_place_needs_no_scratch_memory(self):
        assert products.adds_in_place(torch.device("cuda:0"), torch.bfloat16, torch.float32)
        grad, hidden = (torch.randn(256, n, device="cuda", dtype=torch.bfloat16) for n in (8192, 1024))
        total = torch.zeros(8192, 1024, device="cuda")
        products.add_product(total, grad.t(), hidden)  # the library's own workspace stays allocated
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        products.add_product(total, grad.t(), hidden)
        assert torch.cuda.max_memory_allocated() == before

    def test_without_in_place_addition_the_product_is_computed_first(self, monkeypatch):
        grad, hidden = (torch.randn(256, n, device="cuda", dtype=torch.bfloat16) for n in (1003, 80))
        total = torch.randn(1003, 80, device="cuda")
        expected = total.double() + 0.5 * (grad.double().t() @ hidden.double())
        monkeypatch.setattr(products, "adds_in_place", lambda *_: False)
        products.add_product(total, grad.t(), hidden, 0.5)
        assert relative_error(total, expected) < 1e-6
