"""The gradient of multi-turn samples is the same for any micro-batch size, packing order and layout, in every loss mode.

One process is compared with plain fp64 in every mode (objectives.py), and layouts with one process.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch

from dapo_mcore.batch.context import padded_length, zigzag_positions
from dapo_mcore.replay.digest import token_positions
from dapo_mcore.types import TrainBatch
from tests.actor import objectives, parity
from tests.actor.parity import Mesh

TOLERANCE = 1e-6
TOOL_TOKEN = 120
"""Position in the problem's batch of a token of tool output between two turns: the last before a border of CP 4."""

MODES: dict[str, dict[str, Any]] = {
    "old log-probs from the actor": {"algo__old_logprobs": "actor"},
    "truncated importance sampling": {"algo__old_logprobs": "actor", "algo__tis": {"mode": "truncate", "cap": 1.2}},
    "masked importance sampling": {"algo__tis": {"mode": "mask", "cap": 1.5}},
    "IcePop": {"algo__old_logprobs": "actor", "algo__tis": {"mode": "icepop", "lower": 0.8, "cap": 1.3}},
    "two updates": {
        "batch__mini_batch_prompts": 2,
        "algo__old_logprobs": "actor",
        "algo__tis": {"mode": "truncate", "cap": 1.2},
    },
    "kl in the loss": {"algo__kl": {"coef": 0.1, "estimator": "k3"}},
    "kl in the reward": {
        "algo__old_logprobs": "actor",
        "algo__kl": {"coef": 0.1, "estimator": "k1", "place": "reward"},
    },
    "entropy bonus": {"algo__entropy_coef": 0.01},
    "GRPO's sequence mean": {"algo__loss_mode": "seq-mean-token-mean"},
    "GSPO": {
        "batch__mini_batch_prompts": 2,
        "algo__policy_loss": "gspo",
        "algo__loss_mode": "seq-mean-token-mean",
        "algo__clip_low": 0.02,
        "algo__clip_high": 0.03,
    },
    "CISPO": {"algo__policy_loss": "cispo", "algo__dual_clip": None},
    "REINFORCE++ baseline": {"algo__advantage_std": "batch"},
    "Dr. GRPO": {"algo__loss_mode": "seq-mean-token-sum-norm", "algo__advantage_std": "none"},
    "sequence weights": {
        "algo__old_logprobs": "actor",
        "algo__tis": {"mode": "truncate", "cap": 1.5, "level": "sequence"},
    },
    "geometric weights, normalised": {
        "algo__old_logprobs": "actor",
        "batch__mini_batch_prompts": 2,
        "algo__tis": {"mode": "truncate", "cap": 1.02, "level": "geometric", "normalize": True},
    },
    "token weights, normalised": {
        "algo__old_logprobs": "actor",
        "batch__mini_batch_prompts": 2,
        "algo__tis": {"mode": "truncate", "cap": 1.2, "normalize": True},
    },
    "rejected tokens and responses": {
        "algo__old_logprobs": "actor",
        "algo__loss_mode": "seq-mean-token-mean",
        "algo__tis": {"mode": "truncate", "cap": 1.5, "level": "sequence"},
        "algo__rejection": [
            {"level": "token", "lower": 0.7, "upper": 1.4},
            {"level": "geometric", "lower": 0.6, "upper": 1.3},
        ],
    },
    "sequence mask": {
        "algo__old_logprobs": "actor",
        "algo__loss_mode": "seq-mean-token-mean",
        "algo__tis": {"mode": "truncate", "lower": 0.8, "cap": 1.3},
        "algo__rejection": [{"level": "geometric", "lower": 0.8, "upper": 1.25}],
        "algo__rejection_divisor": "all",
    },
    "rejection by divergences, and a veto": {
        "algo__rejection": [
            {"level": "sequence", "measure": "k3", "upper": 1.5},
            {"level": "geometric", "measure": "k2", "upper": 0.2},
            {"level": "every", "upper": 3.0},
        ],
        "algo__advantage_std": "batch",
    },
    "GSPO without the rejected": {
        "algo__policy_loss": "gspo",
        "algo__loss_mode": "seq-mean-token-mean",
        "algo__clip_low": 0.02,
        "algo__clip_high": 0.03,
        "algo__rejection": [{"level": "token", "lower": 0.7, "upper": 1.3}],
    },
    "KL-Cov": {
        "algo__policy_loss": "kl_cov",
        "algo__dual_clip": None,
        "batch__mini_batch_prompts": 2,
        "algo__kl_cov": {"ratio": 0.1, "coef": 0.7},
    },
    "KL-Cov without the rejected": {
        "algo__policy_loss": "kl_cov",
        "algo__dual_clip": None,
        "algo__kl_cov": {"ratio": 0.2},
        "algo__rejection": [{"level": "token", "upper": 1.3}],
        "algo__tis": {"mode": "mask", "cap": 1.5},
    },
    "Clip-Cov": {
        "algo__policy_loss": "clip_cov",
        "algo__dual_clip": None,
        "algo__clip_cov": {"ratio": 0.1, "lower": 0.05, "upper": 2.0},
    },
    "full recompute": {"model__recompute": "full"},
    "offloaded activations": {"model__recompute": "full", "model__offload_activations": True},
    "selective recompute": {"model__recompute": "selective"},
    "attention and MLP recomputed": {"model__recompute": ["core_attn", "mlp"]},
}


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("invariance")
    return str(parity.save_problem(folder / "problem.pt", parity.multi_turn_batch()))


@pytest.fixture(scope="module")
def on_one_process(problem: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return gradient and metrics of every mode on one process."""
    out = tmp_path_factory.mktemp("alone") / "alone.pt"
    parity.spawn(all_modes, Mesh(), problem, str(out))
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("mesh", [Mesh(data=2), Mesh(context=4)], ids=str)
def test_gradient_is_the_same_for_any_micro_batch_size_and_order(mesh, problem):
    found = parity.spawn(vary_micro_batches, mesh, problem)
    assert len({row["num_micro_batches"] for row in found["rows"]}) >= 3, found["rows"]
    for row in found["rows"]:
        assert row["error"] <= TOLERANCE, row
    check_logprobs(parity.load_problem(problem)[0], found["logprobs"], found["of another tool token"])


def check_logprobs(batch: TrainBatch, logprobs: list[float], other: list[float]) -> None:
    """Check log-probs of all tokens, 0 without loss, and those after one token of tool output has changed."""
    expected = torch.zeros(len(batch.tokens), dtype=torch.float64)
    with torch.no_grad():
        for begin, end in pairwise(batch.offsets):
            tokens = torch.from_numpy(batch.tokens[begin:end].astype(np.int64))
            logits = parity.model64("qwen2", False)(tokens[None]).logits[0, :-1]
            expected[begin + 1 : end] = logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    expected[~batch.loss_mask] = 0
    assert (torch.tensor(logprobs) - expected).abs().max() <= 1e-5
    end = batch.offsets[np.searchsorted(batch.offsets, TOOL_TOKEN, "right")]
    later = TOOL_TOKEN + np.flatnonzero(batch.loss_mask[TOOL_TOKEN:end])
    assert len(later) >= 3 and np.flatnonzero(np.array(logprobs) != other).tolist() == later.tolist()


def test_the_problem_has_the_turns_that_are_hard(problem):
    """Tool output first and last in a response, none of the policy's tokens, and tool output across the borders of CP 2 and 4."""
    batch, borders = parity.load_problem(problem)[0], {2: 0, 4: 0}
    assert batch.num_loss_tokens.min() == 0 and np.isnan(batch.rollout_logprobs[~batch.loss_mask]).all()
    masks = [batch.loss_mask[begin:end] for begin, end in pairwise(batch.offsets)]
    plain = [parity.make_batch().loss_mask[begin:end] for begin, end in pairwise(batch.offsets)]
    assert any(mask.any() and not mask[whole.argmax()] for mask, whole in zip(masks, plain)), "begins with tool output"
    assert sum(mask.any() and not mask[-1] for mask in masks) > 1, "ends in it"
    for context, mask in product(borders, masks):
        owners = np.empty(len(mask), int)
        padded = padded_length(np.array([len(mask)]), context)
        for rank in range(context):
            held = zigzag_positions(padded, context, rank)
            owners[held[held < len(mask)]] = rank
        turns = np.flatnonzero(mask)
        between = np.arange(len(mask) - 1) > turns.min(initial=len(mask))
        borders[context] += int(
            (between & ~mask[:-1] & ~mask[1:] & (np.diff(owners) != 0))[: turns.max(initial=0)].sum()
        )
    assert min(borders.values()) >= 2, borders


def test_a_rank_without_any_loss_token_takes_part_and_an_empty_batch_moves_nothing(tmp_path):
    full = parity.off_policy(parity.make_batch())
    longest = int(full.num_loss_tokens.argmax())
    place = np.arange(len(full.tokens))
    inside = (place >= full.offsets[longest]) & (place < full.offsets[longest + 1])
    lone = replace(full, loss_mask=full.loss_mask & inside)
    path = parity.save_problem(tmp_path / "lone.pt", lone)
    result = parity.spawn(train_on_little, Mesh(data=2), str(path))
    assert sorted(result["rows_per_rank"]) == [0, int(lone.loss_mask.sum())]
    assert result["error"] <= TOLERANCE
    assert result["empty_gradient"] == 0.0
    assert result["empty_loss"] == 0.0
    assert result["poisoned_is_skipped"], "a NaN on one rank must leave every rank's parameters as they were"
    assert result["next_step_moves"]


def test_every_mode_of_multi_turn_samples_equals_its_plain_form_in_fp64(problem, on_one_process):
    batch, known = parity.load_problem(problem)[0], {}
    for name, overrides in MODES.items():
        found, config = on_one_process[name], parity.make_config(Mesh(), **overrides)
        key = (config.algo.model_dump_json(), config.batch.mini_batch_prompts)
        if key not in known:
            known[key] = objectives.first_gradient(batch, config)
        gradient, metrics = known[key]
        assert parity.worst(found["gradient"], gradient) <= TOLERANCE, name
        if found["metrics"]["updates_per_step"] == 1:
            assert {metric: found["metrics"][metric] for metric in metrics} == pytest.approx(
                metrics, rel=1e-5, abs=1e-7
            ), name


@pytest.mark.parametrize("mesh", [Mesh(tensor=2, data=2), Mesh(pipeline=2, virtual=2, context=2)], ids=str)
def test_every_mode_gives_the_gradient_and_metrics_of_one_process(mesh, problem, on_one_process, tmp_path):
    out = tmp_path / "spread.pt"
    parity.spawn(all_modes, mesh, problem, str(out))
    expected, found = on_one_process, torch.load(out, weights_only=True)
    for name in MODES:
        reference = torch.cat([g.flatten() for g in expected[name]["gradient"].values()]).double()
        gradient = torch.cat([found[name]["gradient"][key].flatten() for key in expected[name]["gradient"]]).double()
        assert (gradient - reference).norm() <= TOLERANCE * reference.norm(), name
        assert found[name]["metrics"] == pytest.approx(expected[name]["metrics"], rel=1e-4, abs=1e-5), name
    tis = [name for name in MODES if any(metric.startswith("tis/") for metric in found[name]["metrics"])]
    assert tis == [name for name, settings in MODES.items() if "algo__tis" in settings or name == "two updates"]
    assert all(found[name]["own_is_scored"] and expected[name]["own_is_scored"] for name in MODES)
    assert all(0 < found[name]["metrics"]["tis/truncated_ratio"] < 1 for name in tis)
    assert 0 < found["sequence mask"]["metrics"]["rejection/responses"] < 1
    plain = expected["selective recompute"]["gradient"]
    for name in ("full recompute", "offloaded activations", "attention and MLP recomputed"):
        assert all(torch.equal(plain[key], expected[name]["gradient"][key]) for key in plain), name
    assert not torch.equal(plain["lm_head.weight"], expected["entropy bonus"]["gradient"]["lm_head.weight"])
    for name in ("old log-probs from the actor", "truncated importance sampling", "two updates", "kl in the reward"):
        assert found[name]["metrics"]["actor/first_update_ratio_deviation"] == 0.0, name


def vary_micro_batches(layout: Any, mesh: Mesh, path: str) -> dict[str, Any]:
    """Return the error of one mini-batch's gradient for several token budgets, orders and packings, and the log-probs of all
    tokens with and without a change of TOOL_TOKEN. Runs in a worker.
    """
    batch, expected = parity.load_problem(path)
    rows = []
    for max_tokens, packing, seed in [
        (48, True, None),
        (96, True, 1),
        (400, True, 2),
        (40, False, None),
        (400, False, 3),
    ]:
        config = parity.make_config(mesh, batch__max_tokens=max_tokens, batch__packing=packing)
        actor = parity.build_actor(config, layout)
        (mini_batch,) = parity.shared_step(config, layout, batch, actor, seed=seed)
        found = parity.gradient_of(actor, mini_batch)
        error = parity.worst(found, expected["grads"]) if layout.is_controller else 0.0
        rows.append({"setting": (max_tokens, packing, seed), "num_micro_batches": len(mini_batch), "error": error})
    tokens = batch.tokens.copy()
    tokens[TOOL_TOKEN] = (tokens[TOOL_TOKEN] + 7) % parity.VOCAB
    logprobs, other = (logprobs_of(actor, one) for one in (batch, replace(batch, tokens=tokens)))
    return {"rows": rows, "logprobs": logprobs, "of another tool token": other}


def logprobs_of(actor: Any, batch: TrainBatch) -> list[float]:
    """Return the policy's log-probs of the batch's tokens, summed over ranks: 0 without loss."""
    (mini_batch,) = parity.shared_step(actor.config, actor.layout, batch, actor)
    found, offsets = torch.zeros(len(batch.tokens), dtype=torch.float64), torch.from_numpy(batch.offsets)
    for micro in actor.score(mini_batch):
        found.index_add_(0, token_positions(micro, offsets), micro.old_logprobs.double())
    return actor.layout.sum_over_ranks(found).tolist()


def train_on_little(layout: Any, mesh: Mesh, path: str) -> dict[str, Any]:
    """Train two data-parallel ranks on one sample with loss tokens, then on none. Runs in a worker."""
    batch, expected = parity.load_problem(path)
    config = parity.make_config(mesh)
    actor = parity.build_actor(config, layout)
    (mini_batch,) = parity.shared_step(config, layout, batch, actor)
    gradient = parity.gradient_of(actor, mini_batch)
    rows = torch.zeros(layout.data, dtype=torch.int64)
    rows[layout.data_rank] = sum(len(micro.rows) for micro in mini_batch)
    layout.sum_over_ranks(rows)
    nothing = replace(batch, loss_mask=np.zeros_like(batch.loss_mask))
    (empty,) = parity.shared_step(config, layout, nothing, actor)
    empty_gradient = parity.gradient_of(actor, empty)
    before = {name: p.clone() for name, p in actor.policy.named_weights()}
    # only one rank has rows, so only one rank's gradient becomes NaN
    poisoned = actor.update([micro.with_(token_weights=micro.token_weights * float("nan")) for micro in mini_batch])
    unmoved = all(torch.equal(p, before[name]) for name, p in actor.policy.named_weights())
    moved = not actor.update(mini_batch).skipped
    return {
        "poisoned_is_skipped": poisoned.skipped and unmoved,
        "next_step_moves": moved,
        "rows_per_rank": rows.tolist(),
        "error": parity.worst(gradient, expected["grads"]) if layout.is_controller else 0.0,
        "empty_gradient": max((float(g.abs().max()) for g in empty_gradient.values()), default=0.0),
        "empty_loss": actor.update(empty).sums["loss"],
    }


def all_modes(layout: Any, mesh: Mesh, path: str, out: str) -> None:
    """Save gradient and metrics of one step in every mode, on rank 0. Runs in a worker."""
    from dapo_mcore.actor.learner import Learner
    from dapo_mcore.actor.metrics import update_metrics

    batch, _ = parity.load_problem(path)
    results = {}
    for name, overrides in MODES.items():
        config = parity.make_config(mesh, **overrides)
        actor = parity.build_actor(config, layout)
        if actor.reference is not None:
            with torch.no_grad():
                for parameter in actor.reference.parameters():
                    parameter.mul_(1.01)  # with a reference equal to the policy the KL would be 0
        scored = parity.scored_step(config, layout, batch, actor)
        same = own_is_scored(actor, scored.mini_batches[0])
        gradient = parity.capture_first_gradient(actor)
        metrics = update_metrics(Learner(actor, pad_token=0).update(scored), scored.mismatch) | scored.metrics
        results[name] = {"gradient": dict(gradient), "metrics": metrics, "own_is_scored": same}
    if layout.is_controller:
        torch.save(results, out)


def own_is_scored(actor: Any, mini_batch: Any) -> bool:
    """Return True if the gradient has, on every rank, the bits that it has with scored old log-probs."""
    actor.backward([micro.with_(old_logprobs=None) for micro in mini_batch])
    own = [parameter.main_grad.clone() for parameter in actor.policy.parameters()]
    actor.backward(actor.score(mini_batch))
    differ = sum(not torch.equal(p.main_grad, g) for p, g in zip(actor.policy.parameters(), own, strict=True))
    return not actor.layout.sum_over_ranks(torch.tensor([float(differ)])).item()
