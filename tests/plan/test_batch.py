"""The arithmetic of a rollout step."""

from __future__ import annotations

import numpy as np
import pytest

from dapo_mcore.plan.batch import assumed, batch_of, response_lengths
from dapo_mcore.plan.hardware import Assumptions
from tests.plan.jobs import config_with, job


def test_the_papers_step_by_hand() -> None:
    batch = batch_of(job())
    assert (batch.groups_generated, batch.responses, batch.train_samples) == (1536, 24576, 8192)
    assert (batch.samples, batch.updates) == (512, 16)
    assert batch.mean_sample == batch.mean_response + 150
    # all samples of a mini-batch are in the micro-batches of the 8 replicas
    assert batch.tokens * batch.micro_batches * 8 == pytest.approx(512 * batch.mean_sample)
    assert batch.loss_tokens * batch.micro_batches * 8 == pytest.approx(512 * batch.mean_response)
    assert 0.9 * 22528 < batch.tokens <= 22528 == batch.widest
    assert 1 <= batch.imbalance < 1.02


def test_equal_lengths_are_packed_by_hand() -> None:
    """No spread, 10,000 tokens each: two in a micro-batch of 22,528, 64 samples on each replica."""
    batch = batch_of(job(assumed={"mean_response_tokens": 9850, "response_spread": 0}))
    assert batch.micro_batches == 32 and batch.tokens == 20000 and batch.squares == 2 * 10000**2
    assert batch_of(job(assumed={"mean_response_tokens": 9850, "response_spread": 0}), exact=False).micro_batches == 30


def test_the_estimate_is_near_the_plan() -> None:
    for data in (1, 4, 16):
        own = job(nodes=data, gpus_per_node=16, rollout__sglang__num_servers=4)
        exact, estimated = batch_of(own).micro_batches, batch_of(own, exact=False).micro_batches
        assert estimated == pytest.approx(exact, rel=0.06, abs=1)


def test_interleaving_makes_the_number_of_micro_batches_a_multiple_of_the_stages() -> None:
    own = job(
        nodes=12,
        rollout__sglang__num_servers=24,
        parallel__pipeline_parallel=4,
        parallel__tensor_parallel=4,
        parallel__virtual_pipeline_parallel=2,
    )
    assert batch_of(own).micro_batches % 4 == 0
    assert batch_of(own, exact=False).micro_batches % 4 == 0


@pytest.mark.parametrize(
    ("overrides", "assumed", "groups"),
    [
        ({"sampling__style": "none"}, {}, 512),
        ({}, {"kept_ratio": 0.5}, 1024),
        ({"sampling__gen_batch_prompts": 640}, {}, 640),
    ],
)
def test_filtered_groups_are_generated_too(overrides: dict, assumed: dict, groups: int) -> None:
    assert batch_of(job(assumed=assumed, **overrides)).groups_generated == groups


def test_figures_that_the_configuration_implies_are_told_as_numbers() -> None:
    told = assumed(config_with(), Assumptions())
    assert (told.mean_response_tokens, told.kept_ratio) == (0.35 * 20480, 512 / 1536)
    chosen = Assumptions(mean_response_tokens=900, kept_ratio=0.5)
    assert assumed(config_with(), chosen) == chosen
    assert assumed(config_with(sampling__style="none"), Assumptions()).kept_ratio == 1


def test_lengths_are_quantiles_with_a_long_tail_that_the_limit_cuts() -> None:
    lengths = response_lengths(config_with(), Assumptions(), 1001)
    median = 0.35 * 20480 * np.exp(-(0.9**2) / 2)
    assert lengths[500] == round(median) and (np.diff(lengths) >= 0).all()
    assert lengths[-1] == 20480 and 0.01 < (lengths == 20480).mean() < 0.1
    assert lengths.mean() < 0.35 * 20480  # the cut lowers it
