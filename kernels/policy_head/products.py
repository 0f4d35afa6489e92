"""Matrix products whose operands are narrower than their result: bf16 in, fp32 out, by the vendor's library.

Change here: which call of torch makes them on which device.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`; of bf16 operands, summed and returned in fp32, on a GPU only (see wide_operands)."""
    if a.dtype == dtype:
        return torch.mm(a, b)
    if a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor, factor: float = 1.0) -> None:
    """total += factor · a @ b, in the dtype of `total`, in place; without scratch memory where the library can."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, alpha=factor, out=total)
    elif adds_in_place(a.device, a.dtype, total.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, alpha=factor, out=total)
    else:
        total.add_(product(a, b, total.dtype), alpha=factor)


def wide_operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Operands whose product can be had in the compute dtype: the CPU has no bf16 product with an fp32 result."""
    if hidden.dtype == torch.bfloat16 and hidden.is_cpu:
        return hidden.float(), weight.float()
    return hidden, weight


@cache
def adds_in_place(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> bool:
    """Whether addmm of `dtype` operands adds to a `wide` matrix in its own memory: tried once, on a small one.

    torch does so on CUDA since 2.10 (pytorch/pytorch#167931) and documents it nowhere; other devices and settings of
    torch may refuse. Waits for the device, once.
    """
    a = torch.ones(16, 32, dtype=dtype, device=device)[:, 16:].t()  # strided, as the gradient to logits is
    total = torch.full((16, 16), 0.25, dtype=wide, device=device)
    try:
        torch.addmm(total, a, a, out_dtype=wide, alpha=0.5, out=total)
    except (RuntimeError, TypeError):  # refused; no such overload
        return False
    return bool((total == 8.25).all())
