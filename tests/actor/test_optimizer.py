"""Skipped gradient steps, and optimizer state of experts that is saved on one mesh and loaded on others.

Optimizer state of dense models: tests/checkpoint/test_checkpoint.py.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dapo_mcore.actor.optimizer import SkippedUpdates
from dapo_mcore.errors import TrainingError
from tests.actor import families, parity
from tests.actor.cross_entropy import cross_entropy, micro_batch, own_batches
from tests.actor.parity import Mesh


def test_skipped_steps_in_a_row_end_the_run_at_the_limit() -> None:
    skipped_updates = SkippedUpdates(3)
    for skipped in (True, True, False, True, True):
        skipped_updates.add(skipped)
    with pytest.raises(TrainingError, match=r"last 3 gradient steps were skipped.*max_skipped_updates.*fewer than 3"):
        skipped_updates.add(True)


def test_a_run_that_only_skipped_has_not_trained() -> None:
    skipped_updates = SkippedUpdates(10)
    skipped_updates.check_trained()  # a run without gradient steps, for instance one resumed at its end
    skipped_updates.add(True)
    with pytest.raises(TrainingError, match="all 1 gradient steps of this run were skipped"):
        skipped_updates.check_trained()
    skipped_updates.add(False)
    skipped_updates.check_trained()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("experts")
    problem = families.save_problem("qwen2-moe", folder)
    # with distributed experts upstream chains two optimizers
    norms = parity.spawn(train, Mesh(data=2, expert=2), str(problem), str(folder), "save")
    return {"problem": str(problem), "folder": str(folder), "norms": norms}


@pytest.mark.parametrize(
    "mesh",
    [Mesh(tensor=2, sequence_parallel=True), Mesh(pipeline=2), Mesh(tensor=2, sequence_parallel=True, expert=2)],
    ids=str,
)
def test_experts_continue_on_another_mesh_with_their_moments(mesh, saved):
    continued = parity.spawn(train, mesh, saved["problem"], saved["folder"], "load")
    for expected, found in zip(saved["norms"], continued, strict=True):
        assert found == pytest.approx(expected[-2:], rel=1e-6)


def train(layout: Any, mesh: Mesh, problem: str, folder: str, action: str) -> list[list[float]]:
    """Return the gradient norms without and with the distributed optimizer. Runs in a worker.

    `save` takes four steps with a checkpoint in the middle; `load` takes the last two of them from that checkpoint.
    """
    return [train_one(layout, mesh, problem, Path(folder), action, distributed) for distributed in (False, True)]


def train_one(layout: Any, mesh: Mesh, path: str, folder: Path, action: str, distributed: bool) -> list[float]:
    from dapo_mcore.actor.actor import Actor
    from dapo_mcore.architecture.shape import weight_shape
    from dapo_mcore.checkpoint.checkpoint import load_checkpoint, save_checkpoint
    from dapo_mcore.checkpoint.run_state import TrainState
    from dapo_mcore.model_files.megatron_folder import MegatronReader

    problem, run_dir = families.load_problem(path), folder / f"distributed_{distributed}"
    config = parity.make_config(mesh, optimizer__distributed=distributed)
    reader = MegatronReader(problem.converted, weight_shape(problem.hf_config, layout.tensor))
    actor = Actor(config, problem.hf_config, layout, reader)
    norms = [] if action == "load" else [step(actor.ddp, actor.optimizer, problem, layout) for _ in range(2)]
    if action == "load":
        for parameter in actor.policy.parameters():
            parameter.data.zero_()
        load_checkpoint(run_dir / "checkpoints" / "step_000001", actor, layout)
    else:
        state = TrainState(1, 2, 1, loader={}, sampler={}, sampler_arrays={}, config="")
        save_checkpoint(run_dir, actor, state if layout.is_controller else None, layout, keep=1)
    return norms + [step(actor.ddp, actor.optimizer, problem, layout) for _ in range(2)]


def step(ddp: Any, optimizer: Any, problem: Any, layout: Any) -> float:
    from dapo_mcore.actor.forward_backward import run_micro_batches

    ddp.zero_grad_buffer()
    optimizer.megatron.zero_grad()
    batches = [micro_batch(problem, batch, layout) for batch in own_batches(layout)]
    run_micro_batches(ddp, batches, partial(cross_entropy, layout=layout), layout, backward=True)
    norm = optimizer.prepare()
    optimizer.step(norm)
    return norm
