"""The head's eager mode under Megatron's DistributedDataParallel: it adds the gradient of the other mode exactly once.

Every layout of test_parity.py runs in both modes, too. Does not prove: a GPU's streams, bf16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.actor import parity
from tests.actor.parity import Mesh

TOLERANCE = 1e-6  # per tensor, ‖Δ‖₂ / ‖g‖₂
CASES = {
    "tied, one stage": (Mesh(), True, {}),
    "tied, sharded gradients": (Mesh(data=2), True, {}),
    "tied, two stages": (Mesh(pipeline=2), True, {}),
    "tied, two stages of two ranks": (Mesh(tensor=2, pipeline=2), True, {}),
    "sequence parallel": (Mesh(tensor=2, sequence_parallel=True), False, {}),
    "whole gradients": (Mesh(data=2), False, {"optimizer__distributed": False}),
    "full recompute": (Mesh(), True, {"model__recompute": "full"}),
}


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> dict[bool, str]:
    """Return a problem file for tied embeddings and one for untied ones."""
    folder = tmp_path_factory.mktemp("head")
    return {
        tied: str(
            parity.save_problem(
                folder / f"{tied}.pt", parity.off_policy(parity.make_batch(), parity.model64("qwen2", tied)), tied=tied
            )
        )
        for tied in (False, True)
    }


@pytest.mark.parametrize("case", CASES)
def test_eager_mode_gives_the_gradient_of_the_other(case, problems):
    mesh, tied, settings = CASES[case]
    found = parity.spawn(both_modes, mesh, problems[tied], settings, False)
    assert found["num_micro_batches"] >= 3
    assert found["told_ddp"] == [False, True]
    assert max(found["errors"]) <= TOLERANCE and found["difference"] <= TOLERANCE, found


def test_gradients_reduced_during_the_backward_pass_are_complete(problems):
    """DDP starts to sum a bucket after the hook of its last parameter, so after the head's forward pass."""
    found = parity.spawn(both_modes, Mesh(data=2), problems[True], {}, True)
    assert max(found["errors"]) <= TOLERANCE and found["difference"] <= TOLERANCE, found


@pytest.mark.parametrize("mesh", [Mesh(context=2), Mesh(tensor=2, sequence_parallel=True)], ids=str)
def test_gspo_and_cispo_have_the_gradient_of_their_formulas_in_fp64(mesh, problems):
    for name, (error, other) in parity.spawn(errors_of_losses, mesh, problems[False]).items():
        assert error <= TOLERANCE, name
        assert other > 1e-2, f"{name}: the test must tell it from the ratio per token"


def test_a_shared_embedding_without_its_flag_would_be_noticed(problems):
    assert parity.spawn(without_the_flag, Mesh(), problems[True]) > 100 * TOLERANCE


LOSSES = {
    "gspo": {"algo__loss_mode": "seq-mean-token-mean", "algo__clip_low": 0.02, "algo__clip_high": 0.03},
    "cispo": {"algo__dual_clip": None},
}


def errors_of_losses(layout: Any, mesh: Mesh, path: str) -> dict[str, Any]:
    """Return the error of each loss, and how far the gradient of a ratio per token is from it. Runs in a worker."""
    batch, _ = parity.load_problem(path)
    found = {}
    for name, settings in LOSSES.items():
        config = parity.make_config(mesh, algo__policy_loss=name, batch__head_chunk_tokens=16, **settings)
        actor = parity.build_actor(config, layout)
        (mini_batch,) = parity.shared_step(config, layout, batch, actor)
        gradient = parity.gradient_of(actor, mini_batch)
        if layout.is_controller:
            model = parity.model64("qwen2", False)
            formula(model, batch, name, config.algo.clip_low, config.algo.clip_high).backward()
            exact = {key: p.grad.clone() for key, p in model.named_parameters()}
            model.zero_grad()
            parity.dapo_loss(model, batch, config.algo.clip_low, config.algo.clip_high, 3.0).backward()
            plain = {key: p.grad for key, p in model.named_parameters()}
            found[name] = parity.worst(gradient, exact), parity.worst(plain, exact)
    return found


def formula(model: torch.nn.Module, batch: Any, name: str, low: float, high: float) -> torch.Tensor:
    """Return the loss as verl computes it (trainer/ppo/core_algos.py: compute_policy_loss_gspo, compute_policy_loss_cispo)."""
    sequences = []
    for group in np.unique(batch.group_ids):
        rewards = torch.from_numpy(batch.rewards[batch.group_ids == group])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        for sample, advantage in zip(np.flatnonzero(batch.group_ids == group), advantages):
            where = slice(batch.offsets[sample], batch.offsets[sample + 1])
            tokens, mask = torch.from_numpy(batch.tokens[where].astype(np.int64)), batch.loss_mask[where][1:]
            logits = model(tokens[None]).logits[0, :-1]
            logp = logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0][mask]
            old = torch.from_numpy(batch.rollout_logprobs[where].astype(np.float64))[1:][mask]
            if name == "cispo":
                ratio = (logp - old).exp().clamp(1 - low, 1 + high).detach()
                sequences.append(-ratio * advantage * logp)
            elif len(logp):
                ratio = ((logp - old).mean().detach() + logp - logp.detach()).exp()
                loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))
                if advantage < 0:
                    loss = torch.minimum(loss, -advantage * 3.0)
                sequences.append(loss.mean()[None])
    return torch.cat(sequences).mean()


def both_modes(layout: Any, mesh: Mesh, path: str, settings: dict[str, Any], overlap: bool) -> dict[str, Any]:
    """Compare the gradient without eager mode and with it, against fp64 and each other. Runs in a worker."""
    batch, expected = parity.load_problem(path)
    gradients, told_ddp = [], []
    for eager in (False, True):
        config = parity.make_config(mesh, batch__head_eager_grad=eager, batch__head_chunk_tokens=16, **settings)
        actor = build_overlapping(config, layout, expected) if overlap else build(config, layout, expected)
        (mini_batch,) = parity.shared_step(config, layout, batch, actor)
        gradients.append(parity.gradient_of(actor, mini_batch))
        told = layout.is_last_stage and actor.policy[-1].head_weight().grad_added_to_main_grad
        told_ddp.append(bool(layout.max_over_ranks(torch.tensor(float(told)))))
    if not layout.is_controller:
        return {}
    return {
        "num_micro_batches": len(mini_batch),
        "told_ddp": told_ddp,
        "errors": [parity.worst(gradient, expected["grads"]) for gradient in gradients],
        "difference": parity.worst(gradients[1], {name: g.double() for name, g in gradients[0].items()}),
    }


def without_the_flag(layout: Any, mesh: Mesh, path: str) -> float:
    """Return the error in eager mode if DDP ignores autograd's gradient of the shared embedding. Runs in a worker."""
    batch, expected = parity.load_problem(path)
    config = parity.make_config(mesh)
    actor = build(config, layout, expected)
    (mini_batch,) = parity.shared_step(config, layout, batch, actor)
    del actor.policy[-1].head_weight().zero_out_wgrad
    return parity.worst(parity.gradient_of(actor, mini_batch), expected["grads"])


def build(config: Any, layout: Any, expected: dict[str, Any]) -> Any:
    return parity.build_actor(config, layout, expected["family"], expected["tied"])


def build_overlapping(config: Any, layout: Any, expected: dict[str, Any]) -> Any:
    """Return an actor whose DDP sums gradients, in many small buckets, during the last micro-batch's backward pass."""
    from dapo_mcore.actor import wrap as module

    plain = module.DistributedDataParallelConfig
    module.DistributedDataParallelConfig = lambda **given: plain(
        **given | {"overlap_grad_reduce": True, "bucket_size": 5_000}
    )
    actor = build(config, layout, expected)
    module.DistributedDataParallelConfig = plain
    (ddp,) = actor.ddp
    actor.policy.config.no_sync_func = ddp.no_sync
    assert sum(len(buffer.buckets) for buffer in ddp.buffers) > 3
    return actor
