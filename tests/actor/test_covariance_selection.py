"""The choice of tokens on one rank, and over threads that stand for ranks. test_invariance.py has it in real processes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dapo_mcore.actor.covariance_selection import largest, with_selection
from dapo_mcore.config.algo import AlgoConfig

ALONE = SimpleNamespace(is_last_stage=True, reports_loss=True, sum_over_ranks=lambda values: values)


class Ranks:
    """Layouts of threads that sum over one another."""

    def __init__(self, number: int):
        self.barrier, self.parts = threading.Barrier(number), [None] * number

    def layout(self, rank: int, reports: bool = True) -> Any:
        def total(values: torch.Tensor) -> torch.Tensor:
            self.parts[rank] = values.clone()
            self.barrier.wait()
            values.copy_(sum(self.parts))
            self.barrier.wait()
            return values

        return SimpleNamespace(is_last_stage=True, reports_loss=reports, sum_over_ranks=total)


@pytest.mark.parametrize("number", [1, 7, 40, 99, 100, 101])
def test_ranks_choose_what_one_would_and_the_lowest_places_of_equal_keys(number):
    rng = np.random.default_rng(number)
    keys = rng.choice(np.array([5, 2**33, 2**33 + 1, 2**63, 2**64 - 1], np.uint64), 120)
    places, may = rng.permutation(120).astype(np.int64), np.arange(120) % 6 != 0  # 100 candidates
    order = sorted(np.flatnonzero(may), key=lambda at: (-int(keys[at]), places[at]))
    expected = np.isin(np.arange(120), order[:number])
    assert np.array_equal(largest(keys, places, may, number, ALONE), expected)
    ranks, parts = (
        Ranks(4),
        [slice(0, 50), slice(50, 50), slice(50, 120), slice(50, 120)],
    )  # the last two share their rows
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(
                lambda rank: largest(
                    keys[parts[rank]], places[parts[rank]], may[parts[rank]], number, ranks.layout(rank, rank < 3)
                ),
                range(4),
            )
        )
    assert np.array_equal(np.concatenate(found[:3]), expected) and np.array_equal(found[2], found[3])


class Micro(SimpleNamespace):
    def with_(self, **changes: Any) -> Micro:
        return Micro(**self.__dict__ | changes)


def micro(**fields: Any) -> Micro:
    number = len(fields["advantages"])
    return Micro(
        token_weights=torch.ones(number), old_logprobs=None, rollout_logprobs=torch.zeros(number), rows=torch.arange(number),
        sample_ids=torch.zeros(number, dtype=torch.int64), position_ids=torch.arange(number)[None],
    ).with_(**fields)  # fmt: skip


def test_kl_cov_by_hand_without_the_rejected():
    logprobs = torch.tensor([-1.0, -3.0, -9.0, -2.0])
    batch = micro(advantages=torch.tensor([1.0, -1.0, -5.0, 0.0]), token_weights=torch.tensor([1.0, 1.0, 0.0, 1.0]))
    algo = AlgoConfig(policy_loss="kl_cov", kl_cov={"ratio": 0.4, "coef": 0.5})
    (found,), metrics = with_selection([batch], [logprobs], 0, algo, ALONE)
    assert found.old_kl_coefs.tolist() == [0.5, 0, 0, 0]  # the first two are equal: covariance (±1) · (±1)
    assert found.old_logprobs is logprobs
    assert metrics == {"actor/covariance": pytest.approx(2 / 3), "actor/covariance_selected": pytest.approx(1 / 3)}


def test_clip_cov_masks_a_draw_of_candidates():
    logprobs = -torch.arange(100.0)
    batch = micro(advantages=torch.where(torch.arange(100) < 50, 1.0, -1.0), old_logprobs=logprobs)
    algo = AlgoConfig(policy_loss="clip_cov", clip_cov={"ratio": 0.1, "lower": 20.0, "upper": 100.0})
    chosen = []
    for draw in (1, 2, 1):
        (found,), metrics = with_selection([batch], [logprobs], draw, algo, ALONE)
        chosen.append((found.policy_mask == 0).nonzero()[:, 0].tolist())
        assert len(chosen[-1]) == 10 and metrics["actor/covariance_selected"] == 0.1
        assert all(abs(at - 49.5) > 20 for at in chosen[-1])
    assert chosen[0] == chosen[2] != chosen[1]
