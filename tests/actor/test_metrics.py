"""Sums over loss tokens against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dapo_mcore.kernels.policy_loss import PolicyHeadOutput

from dapo_mcore.actor.metrics import SUMS, UpdateStats, micro_batch_stats, update_metrics
from dapo_mcore.algo.correction import mismatch_stats
from dapo_mcore.config.algo import TISConfig
from dapo_mcore.types import MicroBatch


def test_ppo_kl_is_old_minus_new_log_prob_as_in_verl() -> None:
    """Old -1 and -3, new -2 and -2.5: (1 - 0.5) summed. A token that became likelier counts negative."""
    new, none = torch.tensor([-2.0, -2.5]), torch.zeros(2)
    output = PolicyHeadOutput(torch.tensor(0.0), new, none, torch.ones(2), *[none.bool()] * 3, kl=none)
    batch = MicroBatch(
        tokens=torch.zeros(1, 3, dtype=torch.int64),
        position_ids=torch.arange(3)[None],
        cu_seqlens=None,
        lengths=np.array([3]),
        rows=torch.tensor([0, 1]),
        targets=torch.zeros(2, dtype=torch.int64),
        advantages=none,
        token_weights=none,
        rollout_logprobs=new,
        sample_ids=torch.zeros(2, dtype=torch.int64),
        old_logprobs=torch.tensor([-1.0, -3.0]),
    )
    sums = dict(zip(SUMS, micro_batch_stats(output, batch, TISConfig())["sums"].tolist(), strict=False))
    assert (sums["tokens"], sums["nll"], sums["ppo_kl"]) == (2.0, 4.5, 0.5)


def update(aux_loss: float | None) -> UpdateStats:
    mismatch = mismatch_stats(torch.zeros(0), torch.zeros(0))
    sums, maxima = dict.fromkeys(SUMS, 1.0), {"ratio_max_deviation": 0.0}
    return UpdateStats(sums, maxima, mismatch, grad_norm=1.0, lr=0.1, aux_loss=aux_loss)


def test_the_load_balancing_loss_is_a_metric_if_there_is_one() -> None:
    assert update_metrics([update(1.0), update(1.5)])["actor/moe_aux_loss"] == pytest.approx(1.25)
    assert "actor/moe_aux_loss" not in update_metrics([update(None)])
