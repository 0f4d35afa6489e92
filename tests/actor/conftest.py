from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def alone() -> Iterator[Any]:
    """The layout of a job of one process: this one. On a CPU, where all tensors are on one device."""
    if torch.cuda.is_available():
        pytest.skip("only without a CUDA device")
    from dapo_mcore.actor.parallel import layout as layouts
    from tests.actor.parity import Mesh, make_config

    yield layouts.start(make_config(Mesh()).parallel, seed=0)
    layouts.stop()
