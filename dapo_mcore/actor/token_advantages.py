"""Advantages and returns of every loss token, from the critic's values (PPO).

Change here: how the tokens of a sample, which context-parallel ranks hold in parts, are brought together. The formulas are in
algo/gae.py and algo/kl.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.algo.gae import advantages_and_returns, token_rewards
from dapo_mcore.batch.microbatch import POSITIONS, token_places
from dapo_mcore.config.algo import AlgoConfig
from dapo_mcore.kernels.policy_loss import kl_terms
from dapo_mcore.types import MicroBatch


def with_token_advantages(
    micro_batches: Sequence[MicroBatch], rewards: np.ndarray, algo: AlgoConfig, layout: Layout
) -> list[MicroBatch]:
    """Return the micro-batches of a rollout step with `advantages`, whitened over all loss tokens that are not rejected, and
    `returns`.

    rewards  float64 [B] of all samples of the step. Micro-batches have values, and with a KL penalty old and reference log-probs;
             a token weight of 0 is that of a rejected token.
    On ranks that are not of the last stage they are returned as they are. Collectives: two gloo all-reduces, and on the last
    stage all-gathers over the context-parallel group.
    """
    advantages = returns = torch.zeros(0, dtype=torch.float64)
    kept = torch.zeros(0, dtype=torch.bool)
    if layout.is_last_stage:
        advantages, returns = _gae(micro_batches, torch.from_numpy(rewards), algo, layout)
        kept = torch.cat([kept, *(micro.token_weights.cpu() > 0 for micro in micro_batches)])
    advantages = _whiten(advantages, kept, layout)
    if not layout.is_last_stage:
        return list(micro_batches)
    counts = [len(micro.rows) for micro in micro_batches]
    parts = zip(micro_batches, advantages.float().split(counts), returns.float().split(counts), strict=True)
    return [
        micro.with_(advantages=a.to(micro.advantages.device), returns=r.to(micro.advantages.device))
        for micro, a, r in parts
    ]


def _gae(
    micro_batches: Sequence[MicroBatch], rewards: Tensor, algo: AlgoConfig, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns of this rank's rows, float64 [L] in host memory, in the order of the micro-batches."""
    nothing = torch.zeros(3, 0, dtype=torch.float64, device=layout.device)
    own = torch.cat([nothing, *(_rows(micro, algo) for micro in micro_batches)], dim=1)
    everywhere, start = _gather_context(own, layout)
    order = everywhere[0].argsort()
    keys, values, kl = everywhere[:, order].cpu()
    order = order.cpu()
    samples, counts = torch.unique_consecutive((keys // POSITIONS).long(), return_counts=True)
    ends = counts.cumsum(0)
    per_token = token_rewards(rewards[samples], ends, kl if algo.penalises_rewards else None, algo.kl.coef)
    by_token = advantages_and_returns(per_token, values, ends, gamma=algo.gamma, lam=algo.lam)
    mine = slice(start, start + own.size(1))
    advantages, returns = (torch.empty_like(found).index_copy_(0, order, found)[mine] for found in by_token)
    return advantages, returns


def _rows(micro: MicroBatch, algo: AlgoConfig) -> Tensor:
    """Return fp64 [3, L] of a micro-batch's rows: sample and position in one number, value, KL to the reference policy."""
    device = micro.values.device
    keys = token_places(micro).to(device).double()
    kl = torch.zeros_like(keys)
    if algo.penalises_rewards:
        kl = kl_terms(micro.old_logprobs - micro.ref_logprobs, algo.kl.estimator)[0].to(device).double()
    return torch.stack([keys, micro.values.double(), kl])


def _gather_context(own: Tensor, layout: Layout) -> tuple[Tensor, int]:
    """Return the columns of all context-parallel ranks, and where this rank's begin. Collectives: two all-gathers."""
    if layout.context == 1:
        return own, 0
    sizes = [torch.zeros(1, dtype=torch.int64, device=own.device) for _ in range(layout.context)]
    dist.all_gather(sizes, sizes[0].new_tensor([own.size(1)]), group=layout.context_group)
    counts = [int(size) for size in torch.cat(sizes).tolist()]
    padded = torch.nn.functional.pad(own, (0, max(counts) - own.size(1)))
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=layout.context_group)
    return torch.cat([part[:, :count] for part, count in zip(parts, counts)], dim=1), sum(counts[: layout.context_rank])


def _whiten(advantages: Tensor, kept: Tensor, layout: Layout) -> Tensor:
    """Return (A - mean) / √(variance + 1e-8) over all ranks' `kept` tokens, bool [L], with the divisor N - 1; fewer than two stay.

    Values that are not finite do not count, so that only their own mini-batches are skipped.
    Source: masked_whiten of verl 0.9.1 (utils/torch_functional.py). Collectives: two gloo all-reduces.
    """
    counted = advantages[kept & advantages.isfinite()] if layout.reports_loss else advantages[:0]
    count, total = layout.sum_over_ranks(torch.stack([counted.new_tensor(len(counted)), counted.sum()])).tolist()
    mean = total / max(count, 1)
    variance = layout.sum_over_ranks((counted - mean).square().sum().view(1)).item() / max(count - 1, 1)
    return advantages if count < 2 else (advantages - mean) / (variance + 1e-8) ** 0.5
