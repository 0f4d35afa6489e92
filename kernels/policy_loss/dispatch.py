"""Choose the implementation of the loss: torch_path.py (PyTorch) or kernel.py (Triton).

Change here: the rule of the choice.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

Implementation = Literal["auto", "torch", "triton"]

KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def choose(implementation: Implementation, tensor: Tensor) -> ModuleType:
    """Return the module that computes on `tensor`. It offers `score`, `differentiate` and `token_losses`.

    "auto" takes Triton for fp32 and bf16 on a GPU where Triton is installed, otherwise PyTorch.
    Raises ValueError if "triton" is requested but cannot run.
    """
    if implementation not in ("auto", "torch", "triton"):
        raise ValueError(f"implementation {implementation!r} is unknown; use 'auto', 'torch' or 'triton'")
    installed = find_spec("triton") is not None
    supported = tensor.dtype in KERNEL_DTYPES
    if implementation == "torch" or (implementation == "auto" and not (tensor.is_cuda and installed and supported)):
        return import_module(".torch_path", __package__)
    if not installed:
        raise ValueError("implementation 'triton' needs Triton, which is not installed: pip install triton")
    if not supported:
        raise ValueError(f"implementation 'triton' computes float32 and bfloat16, got {tensor.dtype}; use 'torch'")
    kernel = import_module(".kernel", __package__)
    if tensor.is_cpu and not kernel.INTERPRETED:
        raise ValueError(
            "implementation 'triton' runs on CPU tensors only through Triton's interpreter: "
            "set TRITON_INTERPRET=1 before the first use, or use 'torch'"
        )
    return kernel
