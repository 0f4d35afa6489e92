"""The FLOPs of a forward pass: by hand, and by PyTorch's own count of transformers' model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from dapo_mcore.architecture.flops import ForwardFlops, forward_flops
from tests.model_files.zoo import config_of

HEAD = 2 * 101 * 32


@pytest.mark.parametrize(
    ("name", "elements", "per_square"),
    [
        # 4 query heads, 2 key heads of 16: q and o 64 · 32, k and v 32 · 32; gate, up and down 48 · 32
        ("qwen3", 3 * (2 * 2048 + 2 * 1024 + 3 * 1536), 3 * 4 * (16 + 16)),
        # heads of 8. Layer 0 is dense; the others have a router of 4, 2 chosen experts of 24, a shared one of 40 and its gate
        (
            "qwen2-moe-mixed",
            3 * (2 * 1024 + 2 * 512) + 3 * 1536 + 2 * (4 * 32 + 2 * 3 * 24 * 32 + 3 * 40 * 32 + 32),
            3 * 4 * (8 + 8),
        ),
        # latent vectors of 20 and 12 (+ 4 rotary); keys of 8 + 4, values of 6; two shared experts of 24
        (
            "deepseek-v3",
            3 * (20 * 32 + 48 * 20 + 16 * 32 + 56 * 12 + 32 * 24) + 3 * 1536 + 2 * (4 * 32 + (2 + 2) * 3 * 24 * 32),
            3 * 4 * (12 + 6),
        ),
    ],
)
def test_by_hand(name: str, elements: int, per_square: int) -> None:
    assert forward_flops(config_of(name)) == ForwardFlops(2 * elements, per_square, HEAD)


def test_a_tied_output_layer_costs_as_much_as_another() -> None:
    assert forward_flops(config_of("qwen2-tied")) == forward_flops(config_of("qwen2"))


def test_the_sum_over_sequences_and_loss_tokens() -> None:
    assert ForwardFlops(10, 3, 100).count(np.array([2, 5]), 4) == 10 * 7 + 3 * (4 + 25) + 100 * 4


def test_pytorch_counts_the_same_for_transformers_model() -> None:
    """It counts all scores, not the causal half, and the head on every token."""
    config, length = config_of("qwen3", attn_implementation="eager"), 24
    with torch.device("meta"):
        model, tokens = AutoModelForCausalLM.from_config(config), torch.zeros(1, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens)
    ours = forward_flops(config)
    assert counter.get_total_flops() == ours.count(np.array([length]), length) + ours.per_square * length**2
