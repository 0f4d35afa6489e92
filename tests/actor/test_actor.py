"""Scoring and gradient steps of one process. Against other implementations and over meshes: test_parity.py."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from dapo_mcore.actor.actor import Actor
from dapo_mcore.actor.metrics import UpdateStats
from dapo_mcore.actor.model.routing import routers
from dapo_mcore.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from dapo_mcore.model_files.hf_folder import RandomReader
from dapo_mcore.types import MicroBatch
from tests.actor import families, parity
from tests.actor.parity import Mesh
from tests.checkpoint import resuming


def built(layout: Any, **overrides: Any) -> tuple[Actor, list[MicroBatch]]:
    """Return an actor with a mini-batch that is scattered and scored."""
    config = parity.make_config(Mesh(), **overrides)
    actor = parity.build_actor(config, layout)
    return actor, parity.shared_step(config, layout, parity.make_batch(), actor)[0]


@pytest.fixture(scope="module")
def plain(alone) -> tuple[Actor, list[MicroBatch]]:
    """An actor whose tests leave its weights as they are."""
    return built(alone, algo__old_logprobs="actor")


def gradient(actor: Actor) -> torch.Tensor:
    return torch.cat([parameter.main_grad.flatten() for parameter in actor.policy.parameters()])


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_a_backward_pass_replaces_the_gradient_and_leaves_the_weights(plain):
    actor, mini_batch = plain
    before = weights(actor.policy)
    outputs = actor.backward(mini_batch)
    first = gradient(actor)
    actor.backward(mini_batch)
    assert len(outputs) == len(mini_batch) > 1
    assert torch.equal(gradient(actor), first) and first.norm() > 0
    assert torch.equal(weights(actor.policy), before) and actor.num_updates == 0


def test_a_supervised_step_reads_no_advantages_and_maximises_the_likelihood(plain):
    """Its gradient is that of the on-policy objective with advantages 1."""
    actor, mini_batch = plain
    spoiled = [micro.with_(advantages=micro.advantages * float("nan")) for micro in mini_batch]
    actor.backward(spoiled, supervised=True)
    supervised = gradient(actor)
    on_policy = [micro.with_(advantages=torch.ones_like(micro.advantages), old_logprobs=None) for micro in mini_batch]
    actor.backward(on_policy)
    torch.testing.assert_close(supervised, gradient(actor), rtol=1e-6, atol=1e-9)
    assert supervised.isfinite().all() and supervised.norm() > 0


def test_scores_are_what_the_first_gradient_step_finds(plain):
    actor, mini_batch = plain
    scored = actor.score(mini_batch)
    assert all(micro.ref_logprobs is None for micro in scored)
    ratios = [output["maxima"][0].item() for output in actor.backward(scored)]
    assert ratios == [0.0] * len(mini_batch), "|ratio - 1| of every micro-batch"


def test_scoring_and_gradient_steps_take_what_the_feeder_gives(plain, monkeypatch):
    actor, mini_batch = plain
    given = []

    def feeder(micro_batches: Any) -> Any:
        given.append(micro_batches)
        return iter([micro.with_(tokens=torch.zeros_like(micro.tokens)) for micro in micro_batches])

    before = actor.score(mini_batch)[0].old_logprobs
    monkeypatch.setattr(actor, "feeder", feeder)
    after = actor.score(mini_batch)[0].old_logprobs
    actor.backward(mini_batch)
    assert [len(fed) for fed in given] == [len(mini_batch)] * 2 and not torch.equal(before, after)


def test_with_old_log_probs_of_the_rollout_the_scores_do_not_enter_the_loss(alone):
    actor, mini_batch = built(alone, algo__old_logprobs="rollout")
    assert all(micro.old_logprobs is None for micro in mini_batch)
    outputs = actor.backward(mini_batch)
    expected = gradient(actor)
    assert all(output["maxima"][0] > 0.5 for output in outputs), "the engine's log-probs are 0"
    actor.backward(actor.score(mini_batch))
    assert torch.equal(gradient(actor), expected)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"batch__head_eager_grad": False, "batch__head_chunk_tokens": 7, "algo__entropy_coef": 0.01},
        {"algo__tis": {"mode": "truncate", "cap": 0.01}, "algo__kl__coef": 0.1},
        {"algo__tis": {"mode": "mask", "cap": 100.0}, "batch__head_chunk_tokens": 7},
        {"algo__tis": {"mode": "mask", "cap": 100.0}, "algo__old_logprobs": "rollout"},
    ],
    ids=str,
)
def test_a_first_gradient_step_finds_its_old_log_probs_itself_bit_by_bit(alone, overrides):
    actor, mini_batch = built(alone, **{"algo__old_logprobs": "actor"} | overrides)
    assert all(micro.old_logprobs is None for micro in mini_batch)
    own = actor.backward(mini_batch)
    expected = gradient(actor)
    scored = actor.backward(actor.score(mini_batch))
    assert torch.equal(gradient(actor), expected) and expected.norm() > 0
    assert all(torch.equal(a[name], b[name]) for a, b in zip(own, scored, strict=True) for name in a)


def test_a_check_that_fails_leaves_the_weights(plain):
    actor, mini_batch = plain
    before = weights(actor.policy)
    with pytest.raises(RuntimeError, match="as found"):
        actor.update(mini_batch, check=fail)
    assert torch.equal(weights(actor.policy), before)


def fail(stats: UpdateStats) -> None:
    raise RuntimeError(f"{stats.sums['tokens']} tokens, as found")


def test_a_reference_stays_where_the_policy_was_until_it_is_frozen_again(alone):
    actor, mini_batch = built(alone, algo__kl__coef=0.1)
    start = weights(actor.reference)
    assert torch.equal(start, weights(actor.policy)) and not any(p.requires_grad for p in actor.reference.parameters())
    assert all(torch.equal(micro.ref_logprobs, micro.old_logprobs) for micro in actor.score(mini_batch))
    again = actor.score_reference([micro.with_(ref_logprobs=None) for micro in mini_batch])
    assert all(torch.equal(a.ref_logprobs, b.ref_logprobs) for a, b in zip(again, mini_batch, strict=True))
    assert not actor.update(mini_batch).skipped
    assert torch.equal(weights(actor.reference), start) and not torch.equal(weights(actor.policy), start)
    actor.freeze_reference()
    assert torch.equal(weights(actor.reference), weights(actor.policy))


def test_scoring_records_routes_which_the_reference_does_not_take(alone):
    options = dict(model__routing_replay="scoring", algo__old_logprobs="actor", algo__kl__coef=0.1)
    config, hf_config = parity.make_config(Mesh(), **options), families.hf_config("qwen3-moe")
    actor = Actor(config, hf_config, alone, RandomReader(hf_config, 0))
    mini_batch = parity.shared_step(config, alone, parity.make_batch(), actor)[0]
    assert all(micro.routes is None for micro in mini_batch), "the first gradient step needs no scoring pass"
    scored = actor.score(mini_batch)
    assert all(sorted(micro.routes) == [1, 2, 3] for micro in scored)
    wrong = [micro.with_(routes={n: (r + 1) % 4 for n, r in micro.routes.items()}) for micro in scored]
    for micro, before in zip(actor.score_reference(wrong), mini_batch, strict=True):
        assert torch.equal(micro.ref_logprobs, before.ref_logprobs)
    actor.backward(scored)
    right = gradient(actor)
    actor.backward(wrong)
    assert not torch.equal(gradient(actor), right)


def test_log_probs_before_a_gradient_step_are_its_own_on_the_routes_that_it_replays(alone):
    """KL-Cov and Clip-Cov choose by them. The routers have changed since the scoring pass, as after earlier gradient steps."""
    options = dict(
        model__routing_replay="scoring", algo__old_logprobs="actor", algo__policy_loss="kl_cov", algo__dual_clip=None
    )
    config, hf_config = parity.make_config(Mesh(), **options), families.hf_config("qwen3-moe")
    actor = Actor(config, hf_config, alone, RandomReader(hf_config, 0))
    scored = actor.score(parity.shared_step(config, alone, parity.make_batch(), actor)[0])
    routes = [{layer: own.clone() for layer, own in micro.routes.items()} for micro in scored]
    with torch.no_grad():
        for router in routers(actor.policy):
            router.weight.copy_(router.weight.roll(1, 0))
    found, free = (actor.logprobs(micros) for micros in (scored, [micro.with_(routes=None) for micro in scored]))
    for micro, before in zip(scored, routes, strict=True):
        assert all(torch.equal(own, before[layer]) for layer, own in micro.routes.items()), "replayed, not recorded"
    taken = actor.update([micro.with_(old_logprobs=None) for micro in scored]).logprobs
    assert torch.equal(torch.cat(found), torch.cat(taken)) and not torch.equal(torch.cat(free), torch.cat(taken))


def test_a_new_optimizer_starts_without_moments_and_counts_from_zero(alone):
    """Two first steps of Adam move each weight by as much, whatever the steps between: ± lr without weight decay."""
    actor, mini_batch = built(alone, optimizer__weight_decay=0.0)
    for _ in range(2):
        actor.update(mini_batch)
    assert actor.num_updates == 2
    actor.reset_optimizer(actor.config.optimizer)
    assert actor.num_updates == 0
    before = weights(actor.policy)
    actor.update(mini_batch)
    moved = (weights(actor.policy) - before)[gradient_is_clear(actor)].abs()
    torch.testing.assert_close(moved, torch.full_like(moved, parity.LR), rtol=2e-3, atol=0)


def gradient_is_clear(actor: Actor) -> torch.Tensor:
    """Return bool, True where the gradient is far above Adam's epsilon of 1e-8."""
    return gradient(actor).abs() > 1e-4


def test_a_run_that_is_resumed_twice_anywhere_skips_the_same_steps_and_ends_with_the_same_bits(alone, tmp_path):
    """A cosine, a NaN, spikes up to a new level. Neither schedule nor Adam moves with a skipped step."""
    options = dict(
        optimizer__schedule="cosine", optimizer__decay_updates=30, optimizer__spike_factor=3.0,
        optimizer__spike_window=8, optimizer__max_skipped_updates=3,
    )  # fmt: skip
    config = resuming.settings(Mesh(), **options)
    factors = [1.0] * 8 + [1e3, math.nan, 1.0, 1e3, math.nan, 1e3, 1e3, 1e3, 1.0]
    whole = resuming.build_actor(config, alone)
    mini_batch = parity.shared_step(config, alone, parity.make_batch(), whole)[0]
    expected = [scaled_update(whole, mini_batch, factor) for factor in factors]
    verdicts = [verdict for verdict, *_ in expected]
    assert verdicts == [*["taken"] * 8, "spike", "not finite", "taken", "spike", "not finite", "spike",
                        "taken at a new level", "taken", "taken"]  # fmt: skip
    rates = [lr for _, lr, _ in expected]
    assert rates[8] == rates[9] == rates[10] > rates[11] == rates[14] > rates[15]
    for stops in ((9, 14), (12, 13)):  # before, between and after skipped steps
        part, done = resuming.build_actor(config, alone), 0
        for stop in stops:
            assert [scaled_update(part, mini_batch, factor) for factor in factors[done:stop]] == expected[done:stop]
            path = save_checkpoint(tmp_path, part, replace(resuming.STATE, step=stop, num_updates=stop), alone, keep=9)
            part, done = resuming.build_actor(config, alone), stop
            load_checkpoint(path, part, alone)
        assert [scaled_update(part, mini_batch, factor) for factor in factors[done:]] == expected[done:]
        assert part.guard.state == whole.guard.state
        assert resuming.differences(alone, resuming.local_state(whole), resuming.local_state(part)) == []


def scaled_update(actor: Actor, mini_batch: list[MicroBatch], factor: float) -> tuple[str, float, str]:
    """Take a gradient step with a loss that is `factor` times as large. Return its verdict, learning rate and norm."""
    stats = actor.update([micro.with_(token_weights=micro.token_weights * factor) for micro in mini_batch])
    return stats.verdict.value, stats.lr, repr(stats.grad_norm)
