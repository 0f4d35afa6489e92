"""Matrix products with bf16 operands and an fp32 result, by the vendor's library.

Change here: which torch function multiplies on which device.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a @ b in `dtype`. bf16 operands with an fp32 result need a GPU (see wide_operands)."""
    if a.dtype == dtype:
        return torch.mm(a, b)
    if a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor, factor: float = 1.0) -> None:
    """Add factor · a @ b to `total` in place, in its dtype, and without scratch memory if the library can."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, alpha=factor, out=total)
    elif adds_in_place(a.device, a.dtype, total.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, alpha=factor, out=total)
    else:
        total.add_(product(a, b, total.dtype), alpha=factor)


def wide_operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the operands in fp32 on a CPU, which has no bf16 product with an fp32 result; otherwise unchanged."""
    if hidden.dtype == torch.bfloat16 and hidden.is_cpu:
        return hidden.float(), weight.float()
    return hidden, weight


@cache
def adds_in_place(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> bool:
    """Return True if addmm of `dtype` operands can add to a `wide` matrix in place. Tries it once, on a small matrix.

    torch supports this on CUDA since 2.10 (pytorch/pytorch#167931) but does not document it; other devices and settings
    may refuse. The first call waits for the device.
    """
    a = torch.ones(16, 32, dtype=dtype, device=device)[:, 16:].t()  # strided, like the gradient to logits
    total = torch.full((16, 16), 0.25, dtype=wide, device=device)
    try:
        torch.addmm(total, a, a, out_dtype=wide, alpha=0.5, out=total)
    except (RuntimeError, TypeError):  # not supported; no such overload
        return False
    return bool((total == 8.25).all())
