"""Fixtures for every test: optional real data, which is not part of this repository."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: a second thread only waits for the first, dearly on a busy machine


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """Path of a file below DAPO_MCORE_DATA (else ../shared/data beside the repository); skips where it is absent."""
    root = Path(os.environ.get("DAPO_MCORE_DATA") or Path(__file__).parents[2] / "shared" / "data")

    def path_of(name: str) -> Path:
        if not (root / name).exists():
            pytest.skip(f"no {name} in {root}; set DAPO_MCORE_DATA to a folder that has it")
        return root / name

    return path_of
