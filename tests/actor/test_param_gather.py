"""Overlapped gradient reduction and parameter gather change no bit, and every read outside a forward pass gets whole weights.

Two data-parallel ranks sum to the same bits in any order. Three do not: there a run with the same buckets, which are summed after
the backward pass, is the reference. Nor does the norm, so nothing is clipped here. Does not prove: NCCL, and that communication
really runs beside computation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dapo_mcore.types import TrainBatch
from tests.actor import parity
from tests.actor.parity import Mesh
from tests.checkpoint.resharding import optimizer_state

BUCKETS = {"parallel__overlap_grad_reduce": True, "parallel__bucket_size": 3000}
GATHER = BUCKETS | {"parallel__overlap_param_gather": True}
STEP = {"batch__mini_batch_prompts": 2, "batch__max_tokens": 48, "batch__epochs": 2, "optimizer__clip_grad": 0}


@pytest.mark.parametrize(
    ("mesh", "tied", "dtype"),
    [
        (Mesh(data=3), False, "fp32"),
        (Mesh(pipeline=2, data=2), True, "bf16"),
        (Mesh(pipeline=2, virtual=2, data=2), True, "fp32"),
    ],
    ids=str,
)
def test_overlapped_runs_equal_plain_ones_bit_for_bit(mesh: Mesh, tied: bool, dtype: str) -> None:
    found = parity.spawn(compare, mesh, tied, dtype)
    assert found.pop("num_buckets") > 3 and found.pop("differing_sizes")
    assert all(found.values()), found


def compare(layout: Any, mesh: Mesh, tied: bool, dtype: str) -> dict[str, Any]:
    """Train actors with and without overlap on the same mini-batches. Runs in a worker; all values are over all ranks."""
    batch, options = parity.make_batch(), STEP | {"model__dtype": dtype}
    late, _ = trained(layout, mesh, tied, batch, late=True, **options, **BUCKETS)
    gathered, sizes = trained(layout, mesh, tied, batch, **options, **GATHER)
    row: dict[str, Any] = {
        "overlapped": same(late, gathered),
        "weights equal fp32 copies": dtype == "fp32" or all(hold_copies(actor) for actor in (late, gathered)),
        "the head waits": not layout.is_last_stage or gathered.waited == [True] * sum(sizes),
    }
    if layout.data == 2:
        row["overlapped reduction alone"] = same(late, trained(layout, mesh, tied, batch, **options, **BUCKETS)[0])
        row["one bucket"] = same(late, trained(layout, mesh, tied, batch, **options)[0])
    else:
        few = with_one_sample(batch)
        little = [trained(layout, mesh, tied, few, late, **options, **GATHER)[0] for late in (True, False)]
        row["ranks without loss tokens"] = same(*little)
    told = [layout.max_over_ranks(torch.tensor([float(not value)])).item() == 0 for value in row.values()]
    return dict(zip(row, told)) | {
        "num_buckets": len(gathered.ddp[0].bucket_groups),
        "differing_sizes": len(set(sizes)) > 1,
    }


def trained(
    layout: Any, mesh: Mesh, tied: bool, batch: TrainBatch, late: bool = False, **options: Any
) -> tuple[Any, list[int]]:
    """Return an actor after one rollout step, and the number of micro-batches of each gradient step.

    late  sum the buckets after the backward pass
    """
    from dapo_mcore.actor.learner import Learner

    config = parity.make_config(mesh, **options)
    actor = parity.build_actor(config, layout, tied=tied)
    if late:
        for chunk in actor.ddp:
            chunk.ddp_config.overlap_grad_reduce = False
    note_waits(actor)
    scored = parity.scored_step(config, layout, batch, actor)
    # numbers of micro-batches that differ: a bucket must not wait for as many gradients as in the first gradient step
    mini_batches = [mini * times for times, mini in enumerate(scored.mini_batches, start=1)]
    Learner(actor, pad_token=0).update(replace(scored, mini_batches=mini_batches))
    return actor, [len(mini) for mini in mini_batches] * config.batch.epochs


def note_waits(actor: Any) -> None:
    """Let `actor.waited` tell for each loss whether the head's weight was whole when the head read it."""
    actor.waited, loss = [], actor.head.loss

    def noted(model: Any, *args: Any) -> Any:
        group = actor.ddp[-1].param_to_bucket_group[model.head_weight()]
        actor.waited.append(group.param_gather_dispatched and group.param_gather_handle is None)
        return loss(model, *args)

    actor.head.loss = noted


def same(one: Any, other: Any) -> bool:
    """Return True if weights are equal on this rank, and Adam's moments and fp32 copies over all."""
    kinds = [{"weight": dict(actor.policy.named_weights())} | optimizer_state(actor) for actor in (one, other)]
    assert kinds[0].keys() == kinds[1].keys() and all(kinds[0].values())
    return all(torch.equal(kinds[0][kind][name], kinds[1][kind][name]) for kind in kinds[0] for name in kinds[0][kind])


def hold_copies(actor: Any) -> bool:
    """Return True if the bf16 weights are the fp32 copies of all ranks, rounded."""
    copies = optimizer_state(actor)["param"]
    return all(torch.equal(p, copies[name].bfloat16()) for name, p in actor.policy.named_weights())


def with_one_sample(batch: TrainBatch) -> TrainBatch:
    """Return the batch with the loss on its longest response only, so that most ranks have none."""
    place, longest = np.arange(len(batch.tokens)), int(batch.num_loss_tokens.argmax())
    inside = (place >= batch.offsets[longest]) & (place < batch.offsets[longest + 1])
    return replace(batch, loss_mask=batch.loss_mask & inside)
