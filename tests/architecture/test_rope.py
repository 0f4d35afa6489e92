"""Rotary frequencies against the formulas of the papers, in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from dapo_mcore.architecture.rope import read_rope
from dapo_mcore.errors import ConfigError
from tests.actor import families

THETA, DIM = 1e4, 16


def rope(**parameters):
    return read_rope(families.hf_config("llama", rope_parameters={"rope_theta": THETA} | parameters))


def plain() -> torch.Tensor:
    return THETA ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype == torch.float32 and torch.allclose(found.double(), expected, rtol=3e-7, atol=0)


def test_plain_frequencies():
    found = rope(rope_type="default")
    assert close(found.frequencies, plain())
    assert (found.base, found.attention_factor) == (THETA, 1.0)


def test_linear_scaling_divides_every_frequency():
    assert close(rope(rope_type="linear", factor=4.0).frequencies, plain() / 4)


@pytest.mark.parametrize(("low", "high", "original"), [(1.0, 4.0, 8192), (2.0, 6.0, 32)])
def test_llama3_scaling_divides_long_waves_and_blends_those_between(low, high, original):
    found = rope(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=original,
    )
    turns = original * plain() / (2 * math.pi)  # of each wave over the original context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    assert close(found.frequencies, plain() * (kept + (1 - kept) / 8.0))


def test_yarn_blends_over_dims_and_scales_queries_and_keys():
    found = rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)

    def dim_of(turns: float) -> float:
        return DIM * math.log(32 / (turns * 2 * math.pi)) / (2 * math.log(THETA))

    low, high = max(math.floor(dim_of(32)), 0), min(math.ceil(dim_of(1)), DIM - 1)
    scaled = ((torch.arange(DIM // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    assert close(found.frequencies, plain() * (1 - scaled + scaled / 4.0))
    assert found.attention_factor == pytest.approx(0.1 * math.log(4.0) + 1.0)


def test_yarn_takes_an_attention_factor_as_given():
    assert (
        rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, attention_factor=1.5).attention_factor
        == 1.5
    )


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type 'dynamic' is not supported"),
        ({"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}, "'longrope'"),
        ({"rope_type": "linear"}, "lacks factor"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "lacks high_freq_factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, r"partial_rotary_factor 0\.5"),
        ({"rope_type": "default", "mrope_section": [1, 2]}, "mrope_section"),
    ],
)
def test_other_scaling_is_refused_by_name(parameters, message):
    config = families.hf_config("llama")
    config.rope_parameters = {"rope_theta": THETA} | parameters
    with pytest.raises(ConfigError, match=message):
        read_rope(config)
