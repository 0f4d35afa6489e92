"""Generalised advantage estimation for PPO with a critic, and the critic's loss.

Change here: how values and rewards of loss tokens become advantages and returns. Tokens that the policy did not write (prompts,
tool output, padding) are not steps: all tensors hold loss tokens only, so such tokens cannot change anything. Tokens that
algo.rejection keeps out of training are steps: the response went through them, and the rewards after them are earlier tokens', too.
Source: arXiv 1506.02438; the formulas equal compute_gae_advantage_return and compute_value_loss of verl 0.9.1
(trainer/ppo/core_algos.py), but there a rejected token is no step (ray_trainer.py computes advantages with the mask that
rollout_corr_helper.py has narrowed), and the reward on a rejected last token is lost.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_rewards(rewards: Tensor, ends: Tensor, kl: Tensor | None, coef: float) -> Tensor:
    """Return float64 [T]: each sample's reward on its last loss token, minus coef · KL on every token.

    rewards  float64 [n], of samples that have a loss token.
    ends     int64 [n], one past each sample's last token. Tokens are [T], sample after sample.
    kl       [T], estimate of the KL to the reference policy in nats; None without one.
    """
    total = int(ends[-1]) if len(ends) else 0
    found = rewards.new_zeros(total, dtype=torch.float64)
    if kl is not None:
        found -= coef * kl.double()
    return found.index_add_(0, ends - 1, rewards.double())


def advantages_and_returns(
    rewards: Tensor, values: Tensor, ends: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Return (advantages, returns), float64 [T] each: A_t = Σ_k (γλ)^k δ_{t+k} with δ_t = r_t + γ V_{t+1} - V_t, and A_t + V_t.

    rewards, values  [T] of the loss tokens, sample after sample. V_t is read before token t is chosen. After the last token the
                     value is 0, also where a response was cut off.
    ends             int64 [n], one past each sample's last token.
    The sum doubles its length in each pass over the tokens, so a sample of T_b tokens costs log2(T_b) passes.
    Example: γ = λ = 1, rewards [0, 1], values [0.5, 0.25] of one sample: δ = [-0.25, 0.75], advantages [0.5, 0.75], returns [1, 1].
    """
    if not len(values):
        return values.double(), values.double()
    values = values.double()
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    places = torch.arange(len(values), device=values.device)
    left = torch.repeat_interleave(ends, ends - starts) - places  # tokens to the sample's end, with this one
    following = torch.cat([values[1:], values.new_zeros(1)])
    advantages = rewards.double() + gamma * following.masked_fill(left == 1, 0.0) - values
    reach, factor, longest = 1, gamma * lam, int(left.max())
    while reach < longest and factor:
        later = advantages[reach:].masked_fill(left[:-reach] <= reach, 0.0)
        advantages = torch.cat([advantages[:-reach] + factor * later, advantages[-reach:]])
        reach, factor = 2 * reach, factor**2
    return advantages, advantages + values


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip: float | None) -> Tensor:
    """Return ½ · Σ weight · max((V - R)², (clip(V, V_old ± clip) - R)²), differentiable with respect to `values` [T].

    weights  [T], the token weights of the mini-batch (algo/loss.py), so that the sum is the mean that they describe.
    clip     None leaves the clipped term out.
    """
    error = (values - returns).square()
    if clip is not None:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (clipped - returns).square())
    return 0.5 * (weights * error).sum()
