from __future__ import annotations

import math

import numpy as np
import pytest

from dapo_mcore.rollout.sampling.step import Step, staleness_stats
from dapo_mcore.types import Group, Prompt, Rollout, Sample, Score
from tests.rollout.sampling.scripted import MIXED, WRONG, make_config, make_prompts, make_sampler


def sample(length: int, version: int, *spans: tuple[int, int], tool: range = range(0)) -> Sample:
    ids = np.zeros(length, dtype=np.int32)
    mask = ~np.isin(np.arange(length), tool)
    rollout = Rollout(ids, np.zeros(length, np.float32), mask, "stop", version, spans)
    return Sample(rollout, "", Score(1.0, 1.0, True))


def test_a_group_is_as_old_as_its_oldest_token_and_each_token_has_its_own_age() -> None:
    prompt = Prompt("train:0", np.zeros(1, np.int32), "", "")
    resumed = Group(prompt, (sample(10, 2, (0, 2), (4, 3), (9, 5)), sample(2, 5)))
    fresh = Group(prompt, (sample(3, 5), sample(5, 4)))
    # trained by version 6: 4 tokens of age 4, 5 of 3, 1 of 1; 2 of 1; 3 of 1; 5 of 2, over 20 tokens
    assert staleness_stats([resumed, fresh], trained=6) == {
        "sampling/staleness_mean": 3.0,
        "sampling/staleness_max": 4.0,
        "sampling/token_staleness_mean": pytest.approx((16 + 15 + 1 + 2 + 3 + 10) / 20),
        "sampling/samples_resumed": 1.0,
    }


def test_tool_output_has_no_age() -> None:
    prompt = Prompt("train:0", np.zeros(1, np.int32), "", "")
    turns = sample(10, 2, (0, 2), (6, 3), (9, 4), tool=range(4, 8))  # 4 tokens of version 2, 1 of 3, 1 of 4
    only_a_tool = sample(3, 2, tool=range(3))
    stats = staleness_stats([Group(prompt, (turns, only_a_tool, sample(2, 4)))], trained=5)
    assert stats["sampling/token_staleness_mean"] == pytest.approx((12 + 2 + 1 + 2) / 8)
    nothing = staleness_stats([Group(prompt, (only_a_tool,))], trained=5)
    assert math.isnan(nothing["sampling/token_staleness_mean"]) and nothing["sampling/staleness_mean"] == 3.0


def test_generated_tokens_are_those_of_the_policy() -> None:
    step = Step(make_config("none", train=1), number=1, oldest=0)
    step.generated.append(
        Group(Prompt("train:0", np.zeros(1, np.int32), "", ""), (sample(9, 1, tool=range(2, 7)), sample(3, 1)))
    )
    assert step.stats()["sampling/generated_tokens"] == 7.0


def test_the_engine_gets_the_configured_sampling_parameters():
    sampler, engine = make_sampler(make_prompts(MIXED), make_config("none", train=1))
    sampler.collect(step=0)
    params = engine.calls[0][1]
    assert (params.temperature, params.top_p, params.top_k, params.max_new_tokens) == (0.9, 0.8, -1, 64)


def test_every_call_has_its_own_repeatable_seed():
    def seeds(config_seed: int) -> list[int]:
        config = make_config("filter", train=1, gen_batch_prompts=1, seed=config_seed)
        sampler, engine = make_sampler(make_prompts(*[WRONG, MIXED] * 3), config)
        for step in range(3):
            sampler.collect(step)
        return [params.seed for _, params in engine.calls]

    assert len(seeds(0)) == 6 == len(set(seeds(0)))
    assert seeds(0) == seeds(0)
    assert not set(seeds(0)) & set(seeds(1))
    assert seeds(2**63 - 1) == seeds(2**63 - 1)
