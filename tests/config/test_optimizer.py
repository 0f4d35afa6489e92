"""Rules of the section `optimizer`."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from dapo_mcore.config.optimizer import OptimizerConfig


def test_moments_in_bf16_need_a_beta_that_bf16_does_not_round_away():
    assert OptimizerConfig(exp_avg_dtype="bf16").saves_memory
    assert OptimizerConfig(exp_avg_sq_dtype="bf16", beta2=0.996).saves_memory
    with pytest.raises(
        ValidationError, match=r"exp_avg_sq_dtype bf16 with beta2 0\.999: .* 0\.001 of itself .*; use beta2"
    ):
        OptimizerConfig(exp_avg_sq_dtype="bf16")
    values = 1 + torch.arange(128) / 128  # all of bf16 between two powers of two
    shrinks = {beta: bool(((beta * values).bfloat16() < values).all()) for beta in (0.996, 0.999)}
    assert shrinks == {0.996: True, 0.999: False}


def test_state_that_saves_memory_is_sharded_and_in_one_place():
    with pytest.raises(ValidationError, match="need distributed true"):
        OptimizerConfig(offload_fraction=0.5, distributed=False)
    with pytest.raises(ValidationError, match="exp_avg_dtype bf16 would be ignored on the host"):
        OptimizerConfig(offload_fraction=0.5, exp_avg_dtype="bf16")
    assert not OptimizerConfig(distributed=False).saves_memory


def test_a_spike_factor_needs_more_than_one_skip_and_is_above_1():
    assert (
        OptimizerConfig().spike_factor is None
        and OptimizerConfig(spike_factor=3, max_skipped_updates=2).spike_factor == 3
    )
    with pytest.raises(
        ValidationError, match=r"spike_factor 3 with max_skipped_updates 1 would skip nothing.*at least 2"
    ):
        OptimizerConfig(spike_factor=3, max_skipped_updates=1)
    for wrong in (1.0, float("nan"), float("inf")):
        with pytest.raises(ValidationError, match="spike_factor"):
            OptimizerConfig(spike_factor=wrong)
