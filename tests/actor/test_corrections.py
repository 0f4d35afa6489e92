"""Corrections of a rollout step by hand, on one rank. test_invariance.py has them on many, against fp64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dapo_mcore.actor.corrections import find_corrections
from dapo_mcore.config.algo import AlgoConfig

ALONE = SimpleNamespace(is_last_stage=True, reports_loss=True, sum_over_ranks=lambda values: values)
COUNTS = torch.tensor([2, 1, 0])


def micro(ratios: list[float], ids: list[int]) -> Any:
    old = torch.tensor(ratios).log()
    return SimpleNamespace(old_logprobs=old, rollout_logprobs=torch.zeros_like(old), sample_ids=torch.tensor(ids))


PARTS = [
    micro([4.0], [0]),
    micro([1.5, 1.0], [0, 1]),
]  # the first sample lies in two micro-batches, as over context ranks


def find(tis: dict[str, Any] | None = None, rejection: Any = (), parts: Any = PARTS) -> Any:
    algo = AlgoConfig(tis=tis or {}, rejection=list(rejection))
    return find_corrections(parts, COUNTS, algo, ALONE)


def weights(found: Any) -> list[float]:
    return torch.cat(found.tis_weights).tolist()


def test_weights_by_token_response_and_geometric_mean():
    cap = {"mode": "truncate", "cap": 10.0}
    assert weights(find({**cap, "normalize": True})) == pytest.approx([w * 3 / 6.5 for w in (4, 1.5, 1)])
    found = find({**cap, "level": "sequence"})
    assert weights(found) == pytest.approx([6, 6, 1]) and found.metrics["tis/weight_mean_before"] == pytest.approx(
        13 / 3
    )
    assert weights(find({**cap, "level": "geometric"})) == pytest.approx([6**0.5, 6**0.5, 1])
    assert weights(find({"mode": "mask", "cap": 5.0, "level": "sequence"})) == [0, 0, 1]


def test_normalisation_takes_the_mean_over_responses_of_limited_weights():
    found = find({"mode": "truncate", "cap": 2.0, "level": "sequence", "normalize": True})
    assert found.metrics["tis/norm_factor"] == pytest.approx(1.5)
    assert weights(found) == pytest.approx([2 / 1.5, 2 / 1.5, 1 / 1.5])


def test_a_token_goes_if_any_criterion_rejects_it():
    found = find(rejection=[{"level": "token", "upper": 3.0}, {"level": "geometric", "lower": 1.1}])
    assert torch.cat(found.rejected).tolist() == [True, False, True] and found.num_kept.tolist() == [1, 0, 0]
    assert found.metrics == {"rejection/tokens": pytest.approx(2 / 3), "rejection/responses": 0.5}
    assert found.tis_weights == [None, None]


def test_a_number_that_is_not_finite_stays_in_its_response():
    parts = [micro([4.0], [0]), micro([float("nan"), 1.0], [0, 1])]
    found = find({"mode": "truncate", "cap": 9.0, "level": "sequence", "normalize": True}, parts=parts)
    own = weights(found)
    assert all(map(math.isnan, own[:2])) and own[2] == 1 and found.metrics["tis/weight_mean_after"] == 1
