from __future__ import annotations

import pytest


@pytest.fixture
def small_blocks(monkeypatch):
    """Give the small inputs of these tests several blocks, the last one partial."""
    from dapo_mcore.kernels.policy_loss import kernel

    monkeypatch.setattr(kernel, "SUM_BLOCK", 16)
    monkeypatch.setattr(kernel, "GRADIENT_BLOCK", 32)
    monkeypatch.setattr(kernel, "BLOCK_TOKENS", 32)
