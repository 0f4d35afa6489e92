"""Routers by hand: the load-balancing loss against its formula and finite differences, and recorded routes under recomputation.

One process. The whole actor over expert meshes: test_experts.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dapo_mcore.actor.forward_backward import run_micro_batches
from dapo_mcore.actor.model.policy import Policy, PolicyModel, build_policy
from dapo_mcore.actor.model.routing import PolicyRouter, routers, share_routing
from dapo_mcore.actor.wrap import wrap
from dapo_mcore.types import MicroBatch
from tests.actor import families
from tests.actor.fake_device import DEVICE, HOST, FakeDevice
from tests.actor.parity import Mesh, make_config


def built(layout: Any, family: str, **overrides: Any) -> tuple[Policy, Any]:
    config = make_config(Mesh(), **overrides)
    policy = build_policy(config, families.hf_config(family), layout)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.normal_(0.0, 0.1, generator=noise)
    return policy, config


def micro_batch(tokens: list[int], **fields: Any) -> MicroBatch:
    """Return a micro-batch of one sequence."""
    row, none = torch.tensor(tokens), torch.empty(0)
    return MicroBatch(
        row[None],
        torch.arange(len(row))[None],
        None,
        np.array([len(row)]),
        none,
        none,
        none,
        none,
        none,
        none,
        **fields,
    )


def losses(layout: Any, family: str, sequences: list[int], weights: list[float]) -> tuple[PolicyRouter, Any]:
    """Return a router, and a function that returns (loss, routes) of fp64 logits [tokens, E] of these sequences."""
    policy, _ = built(layout, family, model__moe_aux_loss_coef=0.5, megatron={"moe_router_dtype": "fp64"})
    router = next(routers(policy))
    batch = micro_batch(
        [0] * len(sequences), sequence_ids=torch.tensor([sequences]), balance_weights=torch.tensor(weights)
    )
    router.shared.enter(batch, record=False)

    def loss(logits: torch.Tensor) -> tuple[float, torch.Tensor]:
        probs, routes = router.routing(logits[:, None])
        (probs * 0).sum().backward()  # what remains is the gradient of the loss
        return router.shared.take_loss().item(), routes

    return router, loss


def test_the_loss_of_two_sequences_by_hand(alone):
    """Four experts, two per token. Tokens of sequence 0 choose (0, 1) and (0, 2), those of sequence 1 (2, 3) twice."""
    probs = [
        [0.4, 0.3, 0.2, 0.1],
        [0.4, 0.1, 0.3, 0.2],
        [0.1, 0.2, 0.3, 0.4],
        [0.97, 0.01, 0.01, 0.01],
        [0.1, 0.2, 0.3, 0.4],
    ]
    _, loss = losses(alone, "qwen3-moe", [0, 0, 1, 2, 1], [1 / 8, 1 / 8])  # the fourth token is padding
    logits = torch.tensor(probs, dtype=torch.float64).log().requires_grad_()
    # E / (K · T²) · Σ n · Σ s: 4 / 8 · (2 · 0.8 + 0.4 + 0.5) = 1.25, and 4 / 8 · (2 · 0.6 + 2 · 0.8) = 1.4
    assert loss(logits)[0] == pytest.approx((1.25 + 1.4) / 2, rel=1e-12)
    assert not logits.grad[3].any() and logits.grad[[0, 1, 2, 4]].any(1).all()


@pytest.mark.parametrize("family", ["qwen3-moe", "qwen2-moe", "deepseek-v3"])
def test_the_gradient_is_the_finite_difference_of_the_formula(family, alone):
    """DeepSeek's scores are sigmoids, and its routes come from groups and a bias."""
    sequences, weights = [0, 1, 1, 3, 0, 1, 2, 0], [0.3, 0.2, 0.0]  # sequence 2 has no loss token, 3 is padding
    router, loss = losses(alone, family, sequences, weights)
    experts = router.config.num_moe_experts
    logits = torch.randn(len(sequences), experts, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits.requires_grad_()
    found, routes = loss(logits)

    def formula(values: torch.Tensor) -> float:
        scores = values.sigmoid() if family == "deepseek-v3" else values.softmax(-1)
        scores, total = scores / scores.sum(-1, keepdim=True), 0.0
        for sequence, weight in enumerate(weights):
            mine = torch.tensor(sequences) == sequence
            total += weight * float((routes[mine].sum(0) * scores[mine].sum(0)).sum()) * experts / router.topk
        return total

    assert found == pytest.approx(formula(logits.detach()), rel=1e-6)
    numeric = torch.zeros_like(logits)
    for place in range(logits.numel()):
        step = torch.zeros(logits.numel(), dtype=torch.float64)
        step[place] = 1e-5
        step = step.view_as(logits)
        numeric.view(-1)[place] = (formula(logits.detach() + step) - formula(logits.detach() - step)) / 2e-5
    torch.testing.assert_close(logits.grad, 0.5 * numeric, rtol=1e-6, atol=1e-9)


def test_a_pass_without_gradients_has_no_loss(alone):
    router, _ = losses(alone, "qwen3-moe", [0, 0], [1.0])
    with torch.no_grad():
        router.routing(torch.randn(2, 1, 4))
    assert router.shared.take_loss() == 0


@pytest.fixture
def replayed(alone) -> Any:
    """A model that recomputes all layers, two micro-batches whose routes a scoring pass has recorded, and `run`."""
    options = dict(model__routing_replay="scoring", model__recompute="full", algo__old_logprobs="actor")
    policy, config = built(alone, "qwen3-moe", **options)
    ddp = wrap(policy, config.parallel, config.optimizer)
    batches = [micro_batch([5, 3, 8, 1, 9], routes={}), micro_batch([2, 7, 4], routes={})]

    def run(batches: list[MicroBatch]) -> torch.Tensor:
        for chunk in ddp:
            chunk.zero_grad_buffer()
        run_micro_batches(ddp, batches, total, alone, backward=True)
        return torch.cat([parameter.main_grad.flatten() for parameter in policy.parameters()])

    run_micro_batches(policy, batches, total, alone, backward=False)
    return policy, batches, run


def total(model: PolicyModel, hidden: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return (hidden * torch.linspace(0, 1, hidden.numel()).view_as(hidden)).sum(), {}


def test_a_replay_with_the_same_weights_changes_no_bit(replayed):
    _, batches, run = replayed
    for batch in batches:
        assert {number: (tuple(routes.shape), routes.dtype) for number, routes in batch.routes.items()} == {
            number: ((batch.tokens.size(1), 2), torch.uint8) for number in (1, 2, 3)
        }
    assert torch.equal(run(batches), run([batch.with_(routes=None) for batch in batches]))


def test_changed_routers_still_take_the_recorded_routes_and_recompute_them(replayed):
    policy, batches, run = replayed
    with torch.no_grad():
        for router in routers(policy):
            router.weight.copy_(router.weight.roll(1, 0))
    taken: dict[int, list[torch.Tensor]] = {}
    for router in routers(policy):
        router.register_forward_hook(
            lambda module, _, output: taken.setdefault(module.layer_number, []).append(output[1])
        )
    run(batches)
    for number, maps in taken.items():
        recorded = [
            torch.zeros_like(maps[0][:1]).expand(len(b.routes[number]), -1).scatter(1, b.routes[number].long(), True)
            for b in batches
        ]
        # forward pass and recomputation of the first micro-batch, then of the second
        expected = [recorded[0], recorded[0], recorded[1], recorded[1]]
        assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True)), number
    own = taken.copy()
    taken.clear()
    run([batch.with_(routes=None) for batch in batches])
    assert not any(torch.equal(a, b) for number in own for a, b in zip(taken[number], own[number], strict=True))


def test_routes_that_were_not_recorded_or_are_another_micro_batch_s_are_an_error(replayed):
    _, (first, second), run = replayed
    with pytest.raises(AssertionError, match="no recorded routes of layer 1"):
        run([first.with_(routes={})])
    with pytest.raises(AssertionError, match="another micro-batch's"):
        run([first.with_(routes=second.routes)])


def test_on_a_device_routes_wait_on_the_host_and_the_host_waits_for_none(alone):
    options = dict(model__routing_replay="scoring", model__moe_aux_loss_coef=0.1, algo__old_logprobs="actor")
    policy, config = built(alone, "qwen3-moe", **options)
    router = next(routers(policy))
    with FakeDevice() as fake:
        shared = share_routing(router, config.model, replace(alone, device=DEVICE))
        balance = dict(sequence_ids=torch.tensor([[0, 0, 1, 2, 1]]), balance_weights=torch.tensor([0.5, 0.5]))
        batch = micro_batch([0] * 5, **{name: value.to(DEVICE) for name, value in balance.items()}, routes={})
        logits = torch.randn(5, 1, 4, device=DEVICE, requires_grad=True)
        fake.waits.clear()
        shared.enter(batch, record=True)
        with torch.no_grad():
            router.routing(logits)
        assert fake.side(batch.routes[1]) == HOST
        shared.enter(batch, record=False)
        probs, _ = router.routing(logits)
        probs.sum().backward()
        assert fake.side(shared.take_loss()) == DEVICE and not fake.waits


def test_without_replay_a_router_is_megatrons_own(alone):
    policy, _ = built(alone, "qwen3-moe")
    assert all(router.router_replay is None for router in routers(policy))
    dense, _ = built(alone, "qwen2")
    assert dense[0].expert_routing is None
