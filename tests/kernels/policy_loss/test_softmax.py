"""The vocabulary-parallel softmax and its gradient, by hand: logits 0 and ln 3 give probabilities 1/4 and 3/4."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log

import pytest
import torch
from dapo_mcore.kernels.policy_loss.shard import VocabShard
from dapo_mcore.kernels.policy_loss.softmax import logit_gradient, target_softmax

QUARTER, THREE_QUARTERS = log(1 / 4), log(3 / 4)
ENTROPY = -(QUARTER + 3 * THREE_QUARTERS) / 4


def rows() -> torch.Tensor:
    """Return two rows with a padded column, which would win the softmax."""
    return torch.tensor([[0.0, log(3), 50.0]] * 2, dtype=torch.float64)


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_log_probs_entropies_and_gradients_by_hand():
    softmax = target_softmax(rows(), torch.tensor([0, 1]), VocabShard.of(3, 2, None))
    torch.testing.assert_close(softmax.logprobs, vector(QUARTER, THREE_QUARTERS))
    torch.testing.assert_close(softmax.entropy, vector(ENTROPY, ENTROPY))
    # d logp / d logit: 1 - p for the target, -p for the other
    gradient = logit_gradient(softmax, vector(1.0, 2.0), None)
    torch.testing.assert_close(gradient, torch.tensor([[0.75, -0.75, 0.0], [-0.5, 0.5, 0.0]], dtype=torch.float64))


def test_the_gradient_of_the_entropy_by_hand():
    softmax = target_softmax(rows(), torch.tensor([0, 1]), VocabShard.of(3, 2, None))
    # d(-entropy) / d logit = p · (log p + entropy), the same for both targets
    first, second = (QUARTER + ENTROPY) / 4, (THREE_QUARTERS + ENTROPY) * 3 / 4
    expected = torch.tensor([[first, second, 0.0], [2 * first, 2 * second, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(logit_gradient(softmax, vector(0.0, 0.0), vector(1.0, 2.0)), expected)


@pytest.mark.parametrize("doubt", [1e-3, 1e-9, 1e-12])
def test_a_nearly_certain_token_keeps_the_digits_of_its_doubt_in_fp32(doubt):
    """1 - p rounds to 0 in fp32 from 1e-8 on."""
    logits = torch.tensor([[0.0, log((1 - doubt) / doubt)]])
    softmax = target_softmax(logits, torch.tensor([1]), VocabShard.of(2, None, None))
    assert softmax.logprobs.item() == pytest.approx(-doubt, rel=1e-3)
    assert logit_gradient(softmax, torch.ones(1), None)[0].tolist() == pytest.approx([-doubt, doubt], rel=1e-5)


@dataclass
class Rank:
    """A VocabShard whose ranks run one after the other: the first pass collects their statistics, the second has all."""

    start: int
    num_real: int
    seen: list[torch.Tensor] = field(default_factory=list)
    is_complete: bool = False

    def all_gather(self, statistics: torch.Tensor) -> torch.Tensor:
        if not self.is_complete:
            self.seen.append(statistics)
        return torch.stack(self.seen)


def test_an_uneven_split_over_ranks_gives_the_softmax_of_one_rank():
    logits = 3 * torch.randn(7, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.tensor([0, 3, 4, 8, 5, 1, 2])
    grad, slope = torch.linspace(-1, 2, 7, dtype=torch.float64), torch.linspace(1, 3, 7, dtype=torch.float64)
    whole = target_softmax(logits.clone(), targets, VocabShard.of(10, 9, None))
    seen: list[torch.Tensor] = []
    ranks = [Rank(start, num_real, seen) for start, num_real in ((0, 5), (5, 4))]  # column 9 is padding
    for is_complete in (False, True):
        for rank in ranks:
            rank.is_complete = is_complete
        parts = [target_softmax(logits[:, r.start : r.start + 5].clone(), targets, r) for r in ranks]
    for part in parts:
        torch.testing.assert_close(part.logprobs, whole.logprobs, rtol=1e-13, atol=0)
        torch.testing.assert_close(part.entropy, whole.entropy, rtol=1e-13, atol=0)
    gradient = torch.cat([logit_gradient(part, grad, slope) for part in parts], 1)
    torch.testing.assert_close(gradient, logit_gradient(whole, grad, slope), rtol=1e-12, atol=1e-15)


def test_a_target_outside_the_vocabulary_has_no_probability():
    softmax = target_softmax(rows(), torch.tensor([2, -1]), VocabShard.of(3, 2, None))
    assert softmax.logprobs.eq(-torch.inf).all() and softmax.entropy.tolist() == pytest.approx([ENTROPY] * 2)
