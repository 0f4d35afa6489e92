"""Workers of test_checkpoint.py that train with a critic: a run that is resumed inside its warm-up, and after it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from dapo_mcore.actor.learner import Learner
from dapo_mcore.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from dapo_mcore.model_files.shard_format import SHARDS
from dapo_mcore.model_files.shard_reader import ShardReader
from tests.actor.parity import Mesh, make_batch, scored_step
from tests.checkpoint.resuming import (
    STATE,
    build_actor,
    differences,
    in_one_process,
    local_state,
    resume_and_fill_the_disk,
    resume_and_save_beside_training,
    settings,
)

WARMUP, LAST = 2, 4
PPO = {
    "algo__advantage": "gae",
    "algo__lam": 0.9,
    "critic__warmup_steps": WARMUP,
    "critic__optimizer": {"lr": 1e-3, "warmup_updates": 8},
}


def tensor_parallel(layout: Any, mesh: Mesh, folder: str) -> dict[str, Any]:
    found = resume_and_fill_the_disk(layout, mesh, folder)
    return found | {"ppo": interrupt_and_resume_ppo(layout, mesh, Path(folder) / "ppo", {})}


def data_parallel(layout: Any, mesh: Mesh, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    found = resume_and_save_beside_training(layout, mesh, folder, options)
    return found | {"ppo": interrupt_and_resume_ppo(layout, mesh, Path(folder) / "ppo", options)}


def single(layout: Any, mesh: Mesh, folder: str, tensor_parallel_path: str, ppo_path: str) -> dict[str, Any]:
    found = in_one_process(layout, mesh, folder, tensor_parallel_path)
    return found | {"ppo": reshard_ppo(layout, mesh, Path(folder) / "ppo", Path(ppo_path))}


def take_step(actor: Any, step: int) -> int:
    """Train on the same batch again, as rollout step `step`. Return the number of the policy's gradient steps."""
    scored = scored_step(actor.config, actor.layout, make_batch(), actor)
    return len(Learner(actor, pad_token=0).train(scored, step).policy)


def save(folder: Path, actor: Any, step: int) -> Path:
    layout = actor.layout
    return save_checkpoint(
        folder, actor, replace(STATE, step=step) if layout.is_controller else None, layout, keep=LAST
    )


def interrupt_and_resume_ppo(layout: Any, mesh: Mesh, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Take four rollout steps and save each. Then go on after the first, inside the warm-up, and after the third."""
    config = settings(mesh, **PPO, **options)
    actor = build_actor(config, layout)
    updates, saved, states = [], {}, []
    for step in range(1, LAST + 1):
        updates.append(take_step(actor, step))
        saved[step] = save(folder, actor, step)
        states.append(local_state(actor))
    resumed = {}
    for step in (1, 3):
        again = build_actor(config, layout)
        load_checkpoint(saved[step], again, layout)
        for later in range(step + 1, LAST + 1):
            take_step(again, later)
        resumed[step] = differences(layout, local_state(again), states[-1])
    return {
        "updates": updates,
        "changed": [changed(before, after) for before, after in pairwise(states)],
        "resumed": [*resumed.values()],
        "path": str(folder),
    }


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    """Return which models, or their optimizers, differ."""
    names = [name for name in before if not torch.equal(before[name], after[name])]
    return sorted({"critic" if name.startswith("critic.") else "policy" for name in names})


def reshard_ppo(layout: Any, mesh: Mesh, folder: Path, theirs: Path) -> dict[str, float]:
    """Go on after the third step of a run with another layout, and return the largest differences from its fourth by model."""
    actor = build_actor(settings(mesh, **PPO), layout)
    load_checkpoint(theirs / "checkpoints/step_000003", actor, layout)
    take_step(actor, LAST)
    ours, expected = weights(save(folder, actor, LAST)), weights(theirs / "checkpoints/step_000004")
    assert ours.keys() == expected.keys() and any("value_head" in key for key in ours)
    worst = {"policy": 0.0, "critic": 0.0}
    for key, values in ours.items():
        rows = min(len(values), len(expected[key]))  # of a padded vocabulary
        model = "critic" if key.startswith("critic.") else "policy"
        worst[model] = max(worst[model], float((values[:rows] - expected[key][:rows]).abs().max()))
    return worst


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the stored weights, whole, without optimizer state."""
    store = ShardReader(checkpoint / SHARDS)
    sizes = {key: store.size(key) for key in store.tensors if "optimizer." not in key}
    return {key: store.read(key, (0,) * len(size), size) for key, size in sizes.items()}
