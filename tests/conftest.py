"""For every test: threads, signals, the mode of Triton kernels, and optional real data, which is not part of this repository."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: a second thread only waits for the first, dearly on a busy machine

# a shell's background job, or nohup, begins with these ignored, and so would the processes that tests send them to
for number, handler in {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}.items():
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# Kernels run compiled where there is a GPU, and elsewhere in Triton's interpreter. Triton decides when a kernel's
# module is first imported, and megatron imports Triton: hence here, before any test module.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """Path of a file below DAPO_MCORE_DATA (else ../shared/data beside the repository); skips where it is absent."""
    root = Path(os.environ.get("DAPO_MCORE_DATA") or Path(__file__).parents[2] / "shared" / "data")

    def path_of(name: str) -> Path:
        if not (root / name).exists():
            pytest.skip(f"no {name} in {root}; set DAPO_MCORE_DATA to a folder that has it")
        return root / name

    return path_of
