"""Which implementation runs: reference.py (plain PyTorch) or kernel.py (Triton).

Change here: the rule that chooses.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

Implementation = Literal["auto", "reference", "triton"]

KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def choose(implementation: Implementation, tensor: Tensor) -> ModuleType:
    """The module that computes on `tensor`: it offers `score`, `differentiate` and `token_losses`.

    "auto" takes Triton for fp32 and bf16 on a GPU where it is installed, else the reference.
    Raises ValueError where "triton" was asked for and cannot run.
    """
    if implementation not in ("auto", "reference", "triton"):
        raise ValueError(f"implementation {implementation!r} is unknown; use 'auto', 'reference' or 'triton'")
    installed = find_spec("triton") is not None
    fits = tensor.dtype in KERNEL_DTYPES
    if implementation == "reference" or (implementation == "auto" and not (tensor.is_cuda and installed and fits)):
        return import_module(".reference", __package__)
    if not installed:
        raise ValueError("implementation 'triton' needs Triton, which is not installed: pip install triton")
    if not fits:
        raise ValueError(f"implementation 'triton' computes float32 and bfloat16, got {tensor.dtype}; use 'reference'")
    kernel = import_module(".kernel", __package__)
    if tensor.is_cpu and not kernel.INTERPRETED:
        raise ValueError(
            "implementation 'triton' runs on CPU tensors only through Triton's interpreter: "
            "set TRITON_INTERPRET=1 before the first use, or use 'reference'"
        )
    return kernel
