"""GAE and the value loss: by hand, and against verl's recursion in fp64, token by token backwards."""

from __future__ import annotations

import pytest
import torch

from dapo_mcore.algo.gae import advantages_and_returns, token_rewards, value_loss
from tests.algo.plain_gae import recursion


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_two_tokens_by_hand():
    advantages, returns = advantages_and_returns(f64(0, 1), f64(0.5, 0.25), torch.tensor([2]), gamma=1, lam=1)
    assert advantages.tolist() == [0.5, 0.75] and returns.tolist() == [1, 1]
    # γ 0.5, λ 0.5: δ = [0 + 0.125 - 0.5, 0.75] = [-0.375, 0.75], A_0 = -0.375 + 0.25 · 0.75
    advantages, returns = advantages_and_returns(f64(0, 1), f64(0.5, 0.25), torch.tensor([2]), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [-0.1875, 0.75] and returns.tolist() == [0.3125, 1]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.8), (1.0, 0.0), (0.0, 1.0)])
def test_it_is_the_recursion_over_the_masked_rectangle(gamma, lam):
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 37, 2, 0, 64, 5]
    mask = torch.zeros(len(lengths), 80, dtype=torch.bool)
    for row, length in zip(mask, lengths):
        row[torch.randperm(80, generator=generator)[:length]] = True  # gaps, as tool output leaves them
    values, rewards = (torch.randn(mask.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    rewards = rewards * mask
    values[~mask] = 100.0  # what a critic says on tool output must not matter
    expected, expected_returns = recursion(rewards, values, mask, gamma, lam)
    ends = torch.tensor([length for length in lengths if length]).cumsum(0)
    found, returns = advantages_and_returns(rewards[mask], values[mask], ends, gamma=gamma, lam=lam)
    torch.testing.assert_close(found, expected[mask], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns, expected_returns[mask], rtol=1e-12, atol=1e-12)


def test_a_long_sample_sums_all_its_rewards():
    length = 20_480
    advantages, returns = advantages_and_returns(
        torch.ones(length), torch.zeros(length), torch.tensor([length]), gamma=1, lam=1
    )
    assert torch.equal(returns, torch.arange(length, 0, -1, dtype=torch.float64)) and torch.equal(advantages, returns)


def test_no_token_and_the_reward_on_the_last_one():
    nothing = torch.zeros(0)
    assert [
        len(x) for x in advantages_and_returns(nothing, nothing, torch.zeros(0, dtype=torch.int64), gamma=1, lam=1)
    ] == [0, 0]
    ends = torch.tensor([2, 3])
    assert token_rewards(f64(1, -1), ends, None, 0.5).tolist() == [0, 1, -1]
    assert token_rewards(f64(1, -1), ends, f64(0.1, 0.2, 0.4), 0.5).tolist() == pytest.approx([-0.05, 0.9, -1.2])
    assert len(token_rewards(nothing, torch.zeros(0, dtype=torch.int64), None, 0.5)) == 0


def test_the_value_loss_takes_the_larger_of_both_errors():
    # V_old 0, clip 0.5: V = 1 is clipped to 0.5. R = 2: errors 1 and 2.25; R = 0: errors 1 and 0.25; V = 0.3 is not clipped
    values = f64(1.0, 1.0, 0.3).requires_grad_()
    loss = value_loss(values, f64(0, 0, 0), f64(2, 0, 1), f64(0.5, 0.25, 0.25), 0.5)
    assert loss.item() == pytest.approx(0.5 * (0.5 * 2.25 + 0.25 * 1 + 0.25 * 0.49))
    loss.backward()
    assert values.grad.tolist() == pytest.approx([0.0, 0.25, 0.25 * -0.7])
    plain = value_loss(f64(1.0), f64(0), f64(2), f64(1.0), None)
    assert plain.item() == 0.5
