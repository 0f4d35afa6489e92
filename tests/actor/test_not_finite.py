"""NaN and infinity from every source on every rank: all ranks skip the step, name its cause, and go on as if without it."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dapo_mcore.actor.not_finite import INPUTS, check_weights, find_culprit
from dapo_mcore.errors import DapoError, TrainingError
from tests.actor import parity
from tests.actor.parity import Mesh

SETTINGS: dict[str, Any] = {
    "batch__mini_batch_prompts": 2,
    "algo__old_logprobs": "actor",
    "algo__tis": {"mode": "truncate", "cap": 1.2},
    "algo__kl": {"coef": 0.1, "estimator": "k3"},
    "optimizer__warmup_updates": 8,  # each step that is taken has its own learning rate
    "optimizer__spike_factor": 1e3,
    "optimizer__spike_window": 8,
}
MATRIX = "mlp.linear_fc2.weight"
READ = [name for name in INPUTS if name not in ("values", "returns")]
"""By a policy without a critic."""


@pytest.mark.parametrize("mesh", [Mesh(tensor=2, pipeline=2), Mesh(context=2, data=2)], ids=str)
def test_a_number_that_is_not_finite_on_one_rank_skips_the_step_on_all(mesh, tmp_path):
    path = parity.save_problem(tmp_path / "problem.pt", parity.off_policy(parity.make_batch()))
    for row in parity.spawn(poison_each_rank, mesh, str(path), str(tmp_path)):
        rank, sources = row["rank"], row["sources"]
        last_stage = mesh.pipeline == 1 or rank >= 2
        expected = {"gradient", *((*READ, "loss") if last_stage else ())}
        assert sources.keys() == expected, "the search found too few sources"
        for source, found in sources.items():
            assert found == {"skipped on": 4, "unchanged on": 4, "named": True}, (rank, source, found)
        assert row["spike"] == {"skipped on": 4, "unchanged on": 4}, row
        assert row["different"] == 0, f"not as without the skipped steps: {row}"
        assert row["bad weight"] == f"weight on rank {rank}", row
        assert row["files"] == row["expected files"], row


def poison_each_rank(layout: Any, mesh: Mesh, path: str, folder: str) -> list[dict[str, Any]]:
    """Worker."""
    batch, _ = parity.load_problem(path)
    return [poison(layout, mesh, batch, rank, str(Path(folder) / f"rank{rank}")) for rank in range(mesh.world_size)]


def poison(layout: Any, mesh: Mesh, batch: Any, rank: int, folder: str) -> dict[str, Any]:
    """Skip a step for every source on one rank, then compare with an actor that never had these steps."""
    here = layout.rank == rank
    config = parity.make_config(mesh, **SETTINGS, output_dir=folder, optimizer__distributed=rank % 2 == 0)
    actor, twin = (parity.build_actor(config, layout) for _ in range(2))
    scored = parity.scored_step(config, layout, batch, actor)
    first, second = scored.mini_batches
    first = actor.score(first)
    for one in (actor, twin):
        one.update(first)
    sources = {}
    for source in READ:
        bad = [spoil(micro, source) for micro in second] if here and layout.is_last_stage else second
        if total(layout, any(a is not b for a, b in zip(bad, second))):
            sources[source] = skip(actor, bad, source, rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(actor, "backward", partial(spoil_outputs, actor.backward, here))
        if total(layout, here and layout.is_last_stage):
            sources["loss"] = skip(actor, second, "loss", rank)
    finalize = actor.policy.config.finalize_model_grads_func
    actor.policy.config.finalize_model_grads_func = partial(spoil_gradient, finalize, here)
    sources["gradient"] = skip(actor, second, "gradient", None)
    actor.policy.config.finalize_model_grads_func = finalize
    spike = skip_spike(actor, second)
    for one in (actor, twin):
        assert not one.update(second).skipped and one.optimizer.lr == config.optimizer.lr * 2 / 8
    different = sum(not torch.equal(a, b) for a, b in zip(state(actor), state(twin), strict=True))
    return {
        "rank": rank,
        "sources": sources,
        "spike": spike,
        "different": total(layout, different),
        "bad weight": spoil_weight(actor, scored, here, folder),
        "files": sorted(path.name for path in Path(folder).rglob("skipped/*/*")),
        "expected files": [
            f"rank_{n:05d}.safetensors" for n in range(4) if total(layout, n == layout.rank and layout.reports_loss)
        ]
        + ["skip.json"],
    }


def skip(actor: Any, mini_batch: Any, source: str, rank: int | None) -> dict[str, Any]:
    """Take a poisoned step. A gradient may be named on any rank: those of other ranks may be sums that contain it."""
    before, named = [value.clone() for value in state(actor)], []

    def note(stats: Any, culprit: Any, outputs: Any) -> None:
        named.append(culprit.tensor == source and (rank is None or culprit.rank == rank))

    stats = actor.update(mini_batch, on_skip=note)
    return counts(actor, stats, before) | {"named": total(actor.layout, named == [True]) == 4}


def skip_spike(actor: Any, mini_batch: Any) -> dict[str, Any]:
    before = [value.clone() for value in state(actor)]
    norms, actor.guard.state.norms = actor.guard.state.norms, [1e-9] * 8
    found = counts(actor, actor.update(mini_batch), before)
    actor.guard.state.norms = norms
    return found


def counts(actor: Any, stats: Any, before: list[torch.Tensor]) -> dict[str, Any]:
    unchanged = all(torch.equal(a, b) for a, b in zip(state(actor), before, strict=True))
    return {"skipped on": total(actor.layout, stats.skipped), "unchanged on": total(actor.layout, unchanged)}


def spoil_weight(actor: Any, scored: Any, here: bool, folder: str) -> str:
    """Take a rollout step with a NaN in a weight of one rank, and return the tensor and rank that end the run."""
    from dapo_mcore.actor.learner import Learner

    if here:
        with torch.no_grad():
            next(weight for name, weight in actor.policy.named_weights() if name.endswith(MATRIX))[1, 2] = math.nan
    told: list[str] = []
    with pytest.raises(DapoError, match="no longer finite") as caught:
        Learner(actor, pad_token=0, tell=told.append).update(scored)
    assert bool(told) == actor.layout.is_controller and all(f"its batch is in {folder}" in line for line in told)
    words = str(caught.value).partition("first not finite: ")[2].partition(",")[0].split()
    return f"{words[0]} on rank {words[words.index('rank') + 1]}"


def spoil(micro: Any, source: str) -> Any:
    """Return the micro-batch with an infinity in one of its inputs, which a clamp may hide; itself if it has no rows."""
    values = getattr(micro, source)
    if values is None or not len(values):
        return micro
    values = values.clone()
    values[len(values) // 2] = -math.inf
    return micro.with_(**{source: values})


def spoil_outputs(backward: Any, here: bool, *args: Any, **kwargs: Any) -> Any:
    outputs = backward(*args, **kwargs)
    for output in outputs if here else ():
        output["sums"][1] = math.nan
    return outputs


def spoil_gradient(finalize: Any, here: bool, model: Any, *args: Any, **kwargs: Any) -> None:
    finalize(model, *args, **kwargs)
    if here:
        for parameter in model[0].parameters():  # a distributed optimizer reads only a part of each
            parameter.main_grad.fill_(math.inf)


def state(actor: Any) -> list[torch.Tensor]:
    return [*actor.policy.parameters(), *actor.optimizer.tensors()]


def total(layout: Any, value: float) -> int:
    """Return the sum over all ranks."""
    return int(layout.sum_over_ranks(torch.tensor(float(value))))


def test_a_gradient_norm_that_overflows_has_no_tensor_to_blame(alone):
    actor = parity.build_actor(parity.make_config(Mesh()), alone)
    assert find_culprit(actor.policy, (), (), alone) is None


def test_weights_that_are_not_finite_end_the_run_before_an_engine_gets_them(alone):
    actor = parity.build_actor(parity.make_config(Mesh()), alone)
    check_weights(actor.trained, alone)
    name, weight = next((name, weight) for name, weight in actor.policy.named_weights() if name.endswith(MATRIX))
    with torch.no_grad():
        weight[3, 1:3] = -math.inf
    with pytest.raises(TrainingError, match=rf"weight of {name} on rank 0 \(2 of {weight.numel()} values\)"):
        check_weights(actor.trained, alone)
