"""verl's GAE in its plainest form, for comparison: a loop over a padded rectangle, backwards."""

from __future__ import annotations

import torch


def recursion(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (advantages, returns), [n, T] each. Positions outside `mask` pass the later value and advantage on."""
    next_value = advantage = torch.zeros(len(values), dtype=torch.float64)
    found = []
    for t in reversed(range(values.shape[1])):
        m = mask[:, t].double()
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        now = delta + gamma * lam * advantage
        next_value = values[:, t] * m + (1 - m) * next_value
        advantage = now * m + (1 - m) * advantage
        found.append(advantage)
    advantages = torch.stack(found[::-1], dim=1)
    return advantages, advantages + values
