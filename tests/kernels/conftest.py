"""Kernel tests run compiled kernels where there is a GPU, and elsewhere the same kernels in Triton's interpreter.

The interpreter is chosen when a kernel's module is first imported, hence here, before any test module.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
