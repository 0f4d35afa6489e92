from __future__ import annotations

import math

import pytest
import torch

from dapo_mcore.rollout.draw import draw_tokens
from dapo_mcore.types import SamplingParams

PROBS = torch.tensor([0.5, 0.05, 0.25, 0.2], dtype=torch.float64)
N = 40_000


def params(temperature: float = 1.0, top_p: float = 1.0, top_k: int = -1) -> SamplingParams:
    return SamplingParams(temperature, top_p, top_k, max_new_tokens=1, seed=0)


def frequencies(**law: float) -> torch.Tensor:
    uniforms = torch.rand(N, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    tokens, _ = draw_tokens(PROBS.log().expand(N, -1), uniforms, params(**law))
    return torch.bincount(tokens, minlength=4).double() / N


@pytest.mark.parametrize(
    ("law", "expected"),
    [
        ({}, [0.5, 0.05, 0.25, 0.2]),
        # p^2 = .25, .0025, .0625, .04, sum .355
        ({"temperature": 0.5}, [0.25 / 0.355, 0.0025 / 0.355, 0.0625 / 0.355, 0.04 / 0.355]),
        ({"top_k": 2}, [2 / 3, 0, 1 / 3, 0]),
        # 0.5 + 0.25 reaches 0.7, so the third token is out
        ({"top_p": 0.7}, [2 / 3, 0, 1 / 3, 0]),
        ({"top_p": 0.76}, [0.5 / 0.95, 0, 0.25 / 0.95, 0.2 / 0.95]),
        ({"top_p": 0.01}, [1, 0, 0, 0]),
        # top-p acts on what top-k left: 2/3 of the mass of the best two is the best one
        ({"top_k": 2, "top_p": 0.66}, [1, 0, 0, 0]),
    ],
)
def test_frequencies_follow_the_law(law, expected):
    expected = torch.tensor(expected, dtype=torch.float64)
    five_sigma = 5 * (expected * (1 - expected) / N).sqrt()
    assert ((frequencies(**law) - expected).abs() <= five_sigma).all()


def test_logprob_is_after_temperature_and_before_top_k():
    tokens, logprobs = draw_tokens(PROBS.log()[None], torch.tensor([0.99]), params(temperature=0.5, top_k=1))
    assert tokens.tolist() == [0]
    assert logprobs.item() == pytest.approx(math.log(0.25 / 0.355), abs=1e-6)


def test_temperature_zero_is_greedy_with_the_logprob_of_temperature_one():
    tokens, logprobs = draw_tokens(PROBS.log()[None], torch.tensor([0.99]), params(temperature=0))
    assert tokens.tolist() == [0]
    assert logprobs.item() == pytest.approx(math.log(0.5), abs=1e-6)


def test_extreme_uniforms_never_pick_an_impossible_token():
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]]).expand(2, -1)
    tokens, _ = draw_tokens(logits, torch.tensor([0.0, 1.0], dtype=torch.float64), params())
    assert tokens.tolist() == [1, 2]
