"""Copies of one parameter on several ranks: what happens if one copy's gradient has a NaN, and if copies differ."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from dapo_mcore.actor.replicas import checksum
from dapo_mcore.errors import TrainingError
from tests.actor import parity
from tests.actor.parity import Mesh

NORM = "decoder.final_layernorm.weight"
COLUMN = "decoder.layers.0.self_attention.linear_qkv.weight"
FIRST_EMBEDDING = "embedding.word_embeddings.weight"


def test_a_nan_in_one_copy_skips_the_step_everywhere_and_copies_that_differ_are_named(tmp_path):
    path = parity.save_problem(tmp_path / "problem.pt", parity.off_policy(parity.make_batch()))
    # ranks: 0 and 1 are the tensor-parallel ranks of the first replica, 2 and 3 of the second
    for row in parity.spawn(poison, Mesh(tensor=2, data=2), str(path)):
        assert row.pop("skipped_on") == 4, row
        assert row.pop("unchanged_on") == 4, f"parameters or Adam's moments moved: {row}"
        assert row.pop("moves_then_on") == 4, row
        assert row.pop("ended_on") == 4, f"two skipped steps in a row end the run on every rank: {row}"
        assert row.pop("equal") is None, row
        # rank 2 compares with its neighbours 0 and 3 only
        assert row.pop("norm of rank 1") == f"{NORM} (ranks 0, 3 against rank 1)", row
        # rank 3 has another shard than rank 0, and the same as rank 1
        assert row.pop("matrix of rank 3") == f"{COLUMN} (rank 1 against rank 3)", row


def test_a_tied_embedding_that_differs_between_the_first_and_last_stage_is_named(tmp_path):
    path = parity.save_problem(tmp_path / "problem.pt", parity.make_batch(), "qwen2", tied=True)
    ((equal, found),) = parity.spawn(part_tied_copies, Mesh(pipeline=3), str(path))
    assert equal is None
    assert found == f"{FIRST_EMBEDDING} (rank 0); output_layer.weight (rank 2)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", [0, 1])
def test_a_checksum_sees_every_bit_and_no_order(dtype, start):
    values = torch.randn(1 + 31, dtype=dtype)[start : start + 31]
    before = checksum(values)
    assert checksum(values.clone()) == before
    for index in (0, 15, 30):
        changed = values.clone()
        changed.view(torch.int32 if dtype == torch.float32 else torch.int16)[index] ^= 1
        assert checksum(changed) != before
    assert checksum(torch.tensor([1.0, 2.0, 3.0, 4.0])) == checksum(torch.tensor([3.0, 4.0, 1.0, 2.0]))


def poison(layout: Any, mesh: Mesh, path: str) -> list[dict[str, Any]]:
    """Worker."""
    return [poison_one(layout, mesh, path, distributed) for distributed in (False, True)]


def poison_one(layout: Any, mesh: Mesh, path: str, distributed: bool) -> dict[str, Any]:
    batch, _ = parity.load_problem(path)
    config = parity.make_config(mesh, optimizer__distributed=distributed, optimizer__max_skipped_updates=2)
    actor = parity.build_actor(config, layout)
    (mini_batch,) = parity.shared_step(config, layout, batch, actor)
    actor.update(mini_batch)  # so that Adam has moments
    before = [tensor.clone() for tensor in (*actor.policy.parameters(), *actor.optimizer.tensors())]
    finalize = actor.policy.config.finalize_model_grads_func
    poisoned = partial(_finalize_and_poison, finalize, layout.rank in (1, 3))
    actor.policy.config.finalize_model_grads_func = poisoned
    skipped = actor.update(mini_batch).skipped
    after = [*actor.policy.parameters(), *actor.optimizer.tensors()]
    unchanged = all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    actor.policy.config.finalize_model_grads_func = finalize
    moves = not actor.update(mini_batch).skipped and all(bool(p.isfinite().all()) for p in actor.policy.parameters())
    actor.policy.config.finalize_model_grads_func = poisoned
    actor.update(mini_batch)
    try:
        ended = actor.update(mini_batch) is None
    except TrainingError:
        ended = True
    counts = layout.sum_over_ranks(torch.tensor([skipped, unchanged, moves, ended], dtype=torch.int64)).tolist()
    return {
        "distributed": distributed,
        **dict(zip(("skipped_on", "unchanged_on", "moves_then_on", "ended_on"), counts, strict=True)),
        "equal": told(actor),
        "norm of rank 1": told(actor, NORM, layout.rank == 1),
        "matrix of rank 3": told(actor, COLUMN, layout.rank == 3),
    }


def _finalize_and_poison(finalize: Any, here: bool, model: Any, *args: Any, **kwargs: Any) -> None:
    """Finalise gradients, then put a NaN into this rank's copy of the last norm."""
    finalize(model, *args, **kwargs)
    if here:
        dict(model[0].module.named_parameters())[NORM].main_grad[3] = float("nan")


def told(actor: Any, name: str = "", here: bool = False) -> str | None:
    """Return the check's message, shortened. With `here`, one bit of the named weight's last element differs on this rank."""
    from dapo_mcore.actor.replicas import check_replicas

    weight = dict(actor.policy.named_weights()).get(name)
    if here:
        weight.data.view(torch.int32).view(-1)[-1] ^= 1
    try:
        check_replicas(actor.policy, actor.shape, actor.layout)
    except TrainingError as error:
        return str(error).partition("between ranks: ")[2].partition("; every checkpoint")[0]
    finally:
        if here:
            weight.data.view(torch.int32).view(-1)[-1] ^= 1
    return None


def part_tied_copies(layout: Any, mesh: Mesh, path: str) -> list[list[str | None]]:
    """Worker."""
    actor = parity.build_actor(parity.make_config(mesh), layout, "qwen2", tied=True)
    return [[told(actor), told(actor, "output_layer.weight", layout.is_last_stage)]]
