"""How Triton kernels run in this test process: compiled on a GPU, otherwise in the interpreter, or why not at all."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _obstacle() -> str | None:
    try:
        triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    except PackageNotFoundError as missing:
        return f"needs {missing.name}"
    if DEVICE == "cpu" and triton < (3, 7) and numpy >= (2, 4):
        return f"the interpreter of Triton {version('triton')} fails with numpy {version('numpy')}; use Triton >= 3.7"
    return None


UNAVAILABLE = _obstacle()
IMPLEMENTATIONS = ["torch"] if UNAVAILABLE else ["torch", "triton"]
