"""The critic on real gloo processes against plain fp64: Hugging Face's model with a linear head, verl's GAE and value loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dapo_mcore.actor.actor import Actor
from dapo_mcore.actor.learner import Learner, ScoredStep
from dapo_mcore.actor.not_finite import check_weights
from dapo_mcore.actor.replicas import check_replicas
from dapo_mcore.errors import TrainingError
from dapo_mcore.model_files.hf_folder import RandomReader
from tests.actor import families, parity
from tests.actor.parity import Mesh
from tests.algo.plain_gae import recursion

TOLERANCE = 1e-6
GAE = {
    "algo__advantage": "gae",
    "algo__gamma": 0.99,
    "algo__lam": 0.9,
    "algo__old_logprobs": "actor",
    "algo__kl": {"coef": 0.1, "estimator": "k1", "place": "reward"},
    "critic__clip": 0.2,
}
MESHES = [
    Mesh(),
    Mesh(tensor=2, sequence_parallel=True),
    Mesh(pipeline=2, virtual=2, context=2),
    Mesh(data=3),
]


def small(alone: Any, family: str = "qwen2", **overrides: Any) -> tuple[Any, Any]:
    """Return an actor with a critic in this process, and its mini-batch with the critic's first values and returns."""
    config = parity.make_config(Mesh(), **GAE | {"critic__optimizer": {"lr": 1e-3, "warmup_updates": 0}} | overrides)
    model = families.hf_config(family)
    actor = Actor(config, model, alone, RandomReader(model, seed=0))
    with torch.no_grad():
        actor.critic.model[-1].value_head.weight.copy_(head()[0])
    (mini,) = parity.shared_step(config, alone, parity.make_batch(), actor)
    return actor, mini


def test_a_critic_in_bf16_has_its_head_in_fp32_and_keeps_steps_below_a_rounding(alone):
    actor, mini = small(alone, model__dtype="bf16", critic__optimizer={"lr": 1e-6, "warmup_updates": 0})
    critic, layer = actor.critic, actor.critic.model[0].decoder.layers[0].mlp.linear_fc1.weight
    before, weight = critic.model[-1].value_head.weight.clone(), layer.clone()
    assert before.dtype == torch.float32 and layer.dtype == torch.bfloat16
    assert mini[0].values.dtype == mini[0].returns.dtype == torch.float32
    for _ in range(2):
        assert not critic.update(mini).verdict.skips
    assert not torch.equal(before, critic.model[-1].value_head.weight)
    (master,) = [shard.state["param"] for shard in critic.optimizer.shards() if shard.parameter is layer]
    assert torch.equal(layer, master.view_as(layer).bfloat16()) and not torch.equal(
        master.view_as(layer), weight.float()
    )


@pytest.mark.parametrize("overrides", [{"model__recompute": "full"}, {"model__recompute": ["mlp"]}], ids=str)
def test_recomputed_layers_change_no_bit_of_a_critics_gradient(alone, overrides):
    found = []
    for own in ({}, overrides):
        actor, mini = small(alone, **own)
        found.append((torch.cat([micro.values for micro in mini]), actor.critic.update(mini).grad_norm))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1] > 0


def test_a_critic_in_fp8_learns_with_other_roundings(alone):
    options = {"model__dtype": "bf16", "batch__max_tokens": 400}
    plain, quantised = (small(alone, **options | own) for own in ({}, {"model__fp8": {"recipe": "blockwise"}}))
    values = [torch.cat([micro.values for micro in mini]) for _, mini in (plain, quantised)]
    assert 0 < error(values[1], values[0]) < 0.2
    assert not quantised[0].critic.update(quantised[1]).verdict.skips


def test_a_critic_with_experts_routes_by_itself_and_balances_their_loads(alone):
    experts = {"model__routing_replay": "scoring", "model__moe_aux_loss_coef": 0.1}
    actor, mini = small(alone, "qwen2-moe", **experts)
    assert mini[0].routes, "the policy's routes are recorded"
    critic, values = actor.critic, torch.cat([micro.values for micro in mini])
    nobodys = [
        micro.with_(routes={layer: torch.zeros_like(routes) for layer, routes in micro.routes.items()})
        for micro in mini
    ]
    assert torch.equal(torch.cat([micro.values for micro in critic.score(nobodys)]), values)
    critic.backward(nobodys)
    (router, *_) = [p for name, p in critic.model.named_parameters() if name.endswith("router.weight")]
    balanced = router.main_grad.clone()
    critic.backward([micro.with_(balance_weights=torch.zeros_like(micro.balance_weights)) for micro in mini])
    assert not torch.equal(router.main_grad, balanced)
    assert not critic.update(mini).verdict.skips


def test_a_skipped_step_is_told_and_the_last_in_a_row_ends_the_run(alone):
    limit = {"lr": 1e-3, "max_skipped_updates": 2}
    actor, mini = small(alone, critic__optimizer=limit, critic__warmup_steps=9)
    lines: list[str] = []
    learner = Learner(actor, pad_token=0, tell=lines.append)
    bad = ScoredStep([[micro.with_(returns=micro.returns * float("nan")) for micro in mini]], None, None)
    assert learner.train(bad, step=9).policy == []
    told = "warning: gradient step 1 of the critic was skipped on all ranks: first not finite: returns on rank 0, micro-batch 0, "
    assert lines[0].startswith(told) and lines[0].endswith(
        "critic.optimizer.max_skipped_updates 2 in a row end the run"
    )
    with pytest.raises(
        TrainingError, match=r"returns on rank 0.*critic.optimizer.max_skipped_updates allows fewer than 2"
    ):
        learner.train(bad, step=9)
    with torch.no_grad():
        actor.critic.model[-1].value_head.weight[0, 3] = float("inf")
    with pytest.raises(
        TrainingError, match=r"the critic's weights .*weight of value_head.weight.*lower critic.optimizer.lr"
    ):
        check_weights(actor.trained, alone)


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(parity.save_problem(tmp_path_factory.mktemp("critic") / "problem.pt", parity.multi_turn_batch()))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_values_advantages_and_gradient_equal_the_fp64_reference(mesh, problem):
    found = parity.spawn(compare, mesh, problem)
    for name in ("values", "returns", "advantages", "gradient", "loss"):
        assert found[name] <= TOLERANCE, (name, found)
    assert found["moved"] and found["poisoned_is_skipped"] and found["named"], found


def compare(layout: Any, mesh: Mesh, path: str) -> dict[str, Any]:
    """Return the errors of one mini-batch's values, returns, advantages, loss and gradient. Runs in a worker."""
    batch, _ = parity.load_problem(path)
    overlap = {
        "parallel__overlap_grad_reduce": True,
        "parallel__overlap_param_gather": True,
        "parallel__bucket_size": 3000,
    }
    config = parity.make_config(mesh, **GAE, **(overlap if mesh.data > 1 else {}))
    tied = mesh.pipeline > 1
    actor = parity.build_actor(config, layout, tied=tied)
    with torch.no_grad():
        for parameter in actor.reference.parameters():
            parameter.mul_(1.01)  # with a reference equal to the policy the KL would be 0
    critic = actor.critic
    set_head(critic, layout)
    (mini,) = parity.shared_step(config, layout, batch, actor)
    drifted = [micro.with_(values=micro.values + drift(micro)) for micro in mini] if layout.is_last_stage else mini
    outputs = critic.backward(drifted)
    loss = torch.zeros(1, dtype=torch.float64)
    if layout.reports_loss:
        loss += sum(output["sums"][1] for output in outputs)
    layout.sum_over_ranks(loss)
    gradient = local_gradients(critic)
    tokens = token_values(mini, layout, batch)
    expected = reference(batch, config, tied) if layout.is_controller else None
    before = [parameter.clone() for parameter in critic.model.parameters()]
    poisoned = [micro.with_(token_weights=micro.token_weights * float("nan")) for micro in mini]
    skipped = critic.update(poisoned if layout.rank == layout.world_size - 1 else mini)
    unmoved = all(torch.equal(a, b) for a, b in zip(before, critic.model.parameters(), strict=True))
    moved = not critic.update(drifted).verdict.skips
    for model in actor.trained.values():
        check_replicas(model, actor.shape, layout)
    errors = {name: error(tokens[name], expected[name]) for name in tokens} if expected else {}
    gradients = gathered(gradient, layout)
    if expected:
        errors["gradient"] = max(error(gradients[name], expected["gradient"][name]) for name in gradients)
        errors["loss"] = abs(loss.item() - expected["loss"]) / abs(expected["loss"])
    named = f"token_weights on rank {layout.world_size - 1}" in skipped.cause
    return errors | {"moved": moved, "poisoned_is_skipped": skipped.verdict.skips and unmoved, "named": named}


def set_head(critic: Any, layout: Any) -> None:
    """Give the head the values that `reference` has."""
    if layout.is_last_stage:
        weight, bias = head()
        with torch.no_grad():
            critic.model[-1].value_head.weight.copy_(weight)
            critic.model[-1].value_head.bias.copy_(bias)


def head() -> tuple[torch.Tensor, torch.Tensor]:
    return 0.05 * torch.randn(1, 64, generator=torch.Generator().manual_seed(7), dtype=torch.float64), torch.tensor(
        [0.1]
    )


def drift(micro: Any) -> torch.Tensor:
    """Return how far the old values are from the new ones: some beyond the clip."""
    return 0.3 * torch.sin(micro.targets.double() + micro.sample_ids).float()


def local_gradients(critic: Any) -> dict[str, torch.Tensor]:
    """Return main_grad of the norms and the value head by name, which no tensor-parallel rank splits. The parity tests'
    configuration has the distributed optimizer, whose shards are gathered first."""
    parity.gather_shards(critic)
    found = {}
    for chunk in critic.model:
        for name, parameter in chunk.named_parameters():
            if "norm" in name or "value_head" in name:
                found[chunk._global_name(name)] = parameter.main_grad.clone()
    return found


def gathered(own: dict[str, torch.Tensor], layout: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of all pipeline stages, on rank 0."""
    everywhere = layout.gather_objects(own)
    return {name: tensor for part in everywhere for name, tensor in part.items()} if layout.is_controller else {}


def token_values(mini: list[Any], layout: Any, batch: Any) -> dict[str, torch.Tensor]:
    """Return values, returns and advantages in the order of the batch's loss tokens, on every rank."""
    grid = torch.zeros(3, len(batch.tokens), dtype=torch.float64)
    if layout.reports_loss:
        for micro in mini:
            positions = micro.position_ids.T.flatten()[micro.rows]
            at = torch.from_numpy(batch.offsets)[micro.sample_ids] + positions + 1
            for row, name in enumerate(("values", "returns", "advantages")):
                grid[row, at] = getattr(micro, name).double()
    layout.sum_over_ranks(grid)
    mask = torch.from_numpy(batch.loss_mask)
    return {name: grid[row][mask] for row, name in enumerate(("values", "returns", "advantages"))}


def reference(batch: Any, config: Any, tied: bool) -> dict[str, Any]:
    """Return the same in fp64, sample by sample, with the loss and its gradient."""
    policy, other, model = (parity.model64("qwen2", tied) for _ in range(3))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    weight, bias = (tensor.double().requires_grad_() for tensor in head())
    values, rewards, kept = [], [], np.flatnonzero([m.any() for m in masks(batch)])
    for sample in kept:
        tokens, mask = tokens_of(batch, sample), masks(batch)[sample]
        hidden = model.model(tokens[None]).last_hidden_state[0, :-1][mask]
        values.append((hidden @ weight.T)[:, 0] + bias)
        kl = [
            m(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0][mask]
            for m in (policy, other)
        ]
        reward = -0.1 * (kl[0] - kl[1]).detach()
        reward[-1] += batch.rewards[sample]
        rewards.append(reward)
    width = max(map(len, values))
    pad = lambda rows: torch.stack([torch.nn.functional.pad(r.detach(), (0, width - len(r))) for r in rows])  # noqa: E731
    mask = pad([torch.ones_like(r) for r in rewards]).bool()
    advantages, returns = recursion(pad(rewards), pad(values), mask, config.algo.gamma, config.algo.lam)
    raw, returns, flat = advantages[mask], returns[mask], torch.cat(values)
    old = flat.detach() + 0.3 * torch.sin(torch.cat([targets(batch, s) for s in kept]) + sample_of(batch, kept))
    clipped = old + (flat - old).clamp(-0.2, 0.2)
    loss = 0.5 * torch.maximum((flat - returns) ** 2, (clipped - returns) ** 2).mean()
    loss.backward()
    gradient = {megatron_name(name): p.grad for name, p in model.named_parameters() if "norm" in name}
    gradient |= {"value_head.weight": weight.grad, "value_head.bias": bias.grad}
    whitened = (raw - raw.mean()) / (raw.var() + 1e-8).sqrt()
    return {
        "values": flat.detach(),
        "returns": returns,
        "advantages": whitened,
        "loss": loss.item(),
        "gradient": gradient,
    }


def megatron_name(name: str) -> str:
    """Return Megatron's name of a norm."""
    if name == "model.norm.weight":
        return "decoder.final_layernorm.weight"
    _, _, layer, which, _ = name.split(".")
    return f"decoder.layers.{layer}.{'input_layernorm' if which == 'input_layernorm' else 'pre_mlp_layernorm'}.weight"


def tokens_of(batch: Any, sample: int) -> torch.Tensor:
    return torch.from_numpy(batch.tokens[batch.offsets[sample] : batch.offsets[sample + 1]].astype(np.int64))


def masks(batch: Any) -> list[np.ndarray]:
    return [batch.loss_mask[a:b][1:] for a, b in zip(batch.offsets[:-1], batch.offsets[1:])]


def targets(batch: Any, sample: int) -> torch.Tensor:
    return tokens_of(batch, sample)[1:][torch.from_numpy(masks(batch)[sample])].double()


def sample_of(batch: Any, kept: np.ndarray) -> torch.Tensor:
    return torch.cat([torch.full((int(masks(batch)[s].sum()),), float(s), dtype=torch.float64) for s in kept])


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())
