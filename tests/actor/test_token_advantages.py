"""Advantages and returns of loss tokens: by hand in one process, and over data- and context-parallel ranks of which two are empty."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dapo_mcore.actor.token_advantages import with_token_advantages
from dapo_mcore.config.file import parse_config
from dapo_mcore.types import MicroBatch
from tests.actor import parity
from tests.actor.parity import Mesh

REWARDS = np.array([np.nan, 0, -1, 0, 0, 1.0])  # of six samples: 5 and 2 have loss tokens, 0 could not be scored
SAMPLES, POSITIONS, VALUES = [5, 5, 5, 2], [3, 4, 9, 6], [0.5, 0.25, 0.5, 0.25]  # tool output is at 5 to 8 of sample 5
KL = {"coef": 0.5, "estimator": "k1", "place": "reward"}
# γ = λ = 0.5, sample 5: δ = [0.5 · 0.25 - 0.5, 0.5 · 0.5 - 0.25, 1 - 0.5], each A = δ + 0.25 · the next A. Sample 2: -1 - 0.25
ADVANTAGES = [-0.34375, 0.125, 0.5, -1.25]
RETURNS = [0.15625, 0.375, 1.0, -1.0]


def algo(**keys: Any) -> Any:
    tree = {"model": {"path": "model"}, "data": {"files": ["data"]}, "algo": {"advantage": "gae", **keys}}
    return parse_config(tree).algo


HALVES = algo(gamma=0.5, lam=0.5)


def micro_batch(which: list[int], **changes: torch.Tensor) -> MicroBatch:
    """Return a micro-batch with these of the four rows, in this order. Between them are tokens without loss."""
    rows = 2 * torch.arange(len(which)) + 1
    places = torch.full((1, 2 * len(which) + 1), 7)
    places[0, rows] = torch.tensor(POSITIONS)[which]
    nothing = torch.zeros(len(which))
    plain = MicroBatch(
        tokens=torch.zeros_like(places),
        position_ids=places,
        cu_seqlens=None,
        lengths=np.array([places.numel()]),
        rows=rows,
        targets=torch.zeros(len(which), dtype=torch.int64),
        advantages=nothing,
        token_weights=torch.ones(len(which)),
        rollout_logprobs=nothing,
        sample_ids=torch.tensor(SAMPLES)[which],
        values=torch.tensor(VALUES)[which],
    )
    return plain.with_(**changes)


def whitened(advantages: list[float]) -> np.ndarray:
    return (np.array(advantages) - np.mean(advantages)) / np.sqrt(np.var(advantages, ddof=1) + 1e-8)


def test_the_tokens_of_a_sample_are_put_in_order_and_a_hole_is_no_step(alone):
    first, second = with_token_advantages([micro_batch([2, 0]), micro_batch([3, 1])], REWARDS, HALVES, alone)
    expected = whitened(ADVANTAGES)
    assert first.advantages.tolist() == pytest.approx(expected[[2, 0]].tolist(), rel=1e-6)
    assert second.advantages.tolist() == pytest.approx(expected[[3, 1]].tolist(), rel=1e-6)
    assert first.returns.tolist() == [RETURNS[2], RETURNS[0]] and second.returns.tolist() == [RETURNS[3], RETURNS[1]]


def test_a_kl_in_the_reward_is_paid_at_each_token_and_changes_no_log_prob(alone):
    old, ref = torch.tensor([-1.0, -2.0, -3.0, -4.0]), torch.tensor([-1.5, -2.5, -2.0, -4.0])
    (found,) = with_token_advantages(
        [micro_batch([0, 1, 2, 3], old_logprobs=old, ref_logprobs=ref)], REWARDS, algo(kl=KL), alone
    )
    # rewards of sample 5: -0.5 · 0.5, -0.5 · 0.5, 1 - 0.5 · (-1); with γ = λ = 1 a return is their sum from the token on
    assert found.returns.tolist() == [1.0, 1.25, 1.5, -1.0]
    assert found.old_logprobs is old and found.ref_logprobs is ref
    assert (old.tolist(), ref.tolist()) == ([-1.0, -2.0, -3.0, -4.0], [-1.5, -2.5, -2.0, -4.0])


def test_a_value_that_is_not_finite_spoils_its_own_sample_only(alone):
    values = torch.tensor([np.nan, *VALUES[1:]])
    (found,) = with_token_advantages([micro_batch([0, 1, 2, 3], values=values)], REWARDS, HALVES, alone)
    assert found.advantages[0].isnan()
    assert found.advantages[1:].tolist() == pytest.approx(whitened(ADVANTAGES[1:]).tolist(), rel=1e-6)


@pytest.mark.parametrize("rejected", [0, 1, 2])
def test_a_rejected_token_is_a_step_but_does_not_count_in_the_statistics(alone, rejected):
    """verl leaves it out of the recursion: without token 1 the first advantage were -0.25 + 0.25 · 0.5 = -0.125, and without the last
    token the reward of 1 would be lost, -0.25 for token 1."""
    weights = torch.full((4,), 0.25)
    weights[rejected] = 0.0
    (found,) = with_token_advantages([micro_batch([0, 1, 2, 3], token_weights=weights)], REWARDS, HALVES, alone)
    kept = [token for token in range(4) if token != rejected]
    expected = whitened([ADVANTAGES[token] for token in kept]).tolist()
    assert found.advantages[kept].tolist() == pytest.approx(expected, rel=1e-6)
    assert found.returns.tolist() == RETURNS


def test_a_single_token_is_not_whitened_and_no_token_is_no_error(alone):
    (found,) = with_token_advantages([micro_batch([3])], REWARDS, HALVES, alone)
    assert (found.advantages.tolist(), found.returns.tolist()) == ([-1.25], [-1.0])
    (empty,) = with_token_advantages([micro_batch([])], REWARDS, HALVES, alone)
    assert len(empty.advantages) == len(empty.returns) == 0
    assert with_token_advantages([], REWARDS, HALVES, alone) == []


def test_ranks_share_a_sample_and_the_statistics_and_may_have_no_token():
    found = parity.spawn(share, Mesh(context=2, data=2))
    assert found["returns"] == [[[RETURNS[2]], [RETURNS[0]]], [[RETURNS[1]]], [[RETURNS[3]]], [[]]]
    expected = whitened(ADVANTAGES).tolist()
    assert [value for rank in found["advantages"] for micro in rank for value in micro] == pytest.approx(
        [expected[row] for row in (2, 0, 1, 3)], rel=1e-6
    )


def share(layout: Any, mesh: Mesh) -> dict[str, Any]:
    """Worker. The first replica has sample 5 in two micro-batches of one context-parallel rank and one of the other; the second
    has sample 2 on one of both."""
    parts = {(0, 0): [[2], [0]], (0, 1): [[1]], (1, 0): [[3]], (1, 1): [[]]}[layout.data_rank, layout.context_rank]
    found = with_token_advantages([micro_batch(part) for part in parts], REWARDS, HALVES, layout)
    own = (
        layout.data_rank,
        layout.context_rank,
        [[micro.returns.tolist(), micro.advantages.tolist()] for micro in found],
    )
    everywhere = sorted(layout.gather_objects(own) or [])
    return {
        "returns": [[returns for returns, _ in micros] for *_, micros in everywhere],
        "advantages": [[advantages for _, advantages in micros] for *_, micros in everywhere],
    }
