"""Loads the checkpoint that a start goes on from; a damaged one is set aside, and the one before it is taken.

Change here: what happens to a checkpoint that cannot be loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dapo_mcore.actor.actor import Actor
from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.checkpoint.checkpoint import load_checkpoint
from dapo_mcore.checkpoint.choice import CORRUPT, is_chosen, resumed_checkpoint, take
from dapo_mcore.checkpoint.run_folder import latest_checkpoint, rename, step_of
from dapo_mcore.checkpoint.run_state import TrainState
from dapo_mcore.checkpoint.stored import what_then
from dapo_mcore.config.schema import Config
from dapo_mcore.errors import CheckpointError, DamagedCheckpoint


def load_resumed(
    config: Config, actor: Actor, layout: Layout, tell: Callable[[str], None] = print
) -> tuple[Path, TrainState] | None:
    """Load the checkpoint that this start goes on from into `actor`. Return its folder and state; None if the run begins anew.

    Rank 0 renames damaged ones (`*.corrupt`) once an older one is loaded, and `tell`s it in a line for each. Raise CheckpointError
    if no older one is whole, and if the damaged one is the one that checkpoint.resume names: nothing is renamed then.
    Collectives: every rank must call it.
    """
    damaged: list[tuple[Path, str]] = []
    path = layout.on_controller_or_raise(lambda: resumed_checkpoint(config) if layout.is_controller else None)
    while (path := layout.broadcast_object(path)) is not None:
        try:
            state = load_checkpoint(path, actor, layout)
        except DamagedCheckpoint as error:
            damaged.append((path, str(error)))
            path = layout.on_controller_or_raise(lambda path=path: _before(config, path, damaged, layout))
        else:
            layout.on_controller_or_raise(lambda path=path: _tidy(config, path, damaged, tell, layout))
            return path, state
    return None


def _before(config: Config, path: Path, damaged: list[tuple[Path, str]], layout: Layout) -> Path | None:
    """Rank 0: return the checkpoint before a damaged one. Raise CheckpointError if there is none, or if it was chosen."""
    if not layout.is_controller:
        return None
    before = latest_checkpoint(config.run_dir, before=step_of(path))
    if is_chosen(config, path):
        raise CheckpointError(f"{damaged[-1][1]}; checkpoint.resume names this checkpoint: choose another one")
    if before is None:
        told = "; ".join(message for _, message in damaged)
        raise CheckpointError(f"{told}; {what_then(path)}")
    return before


def _tidy(
    config: Config, path: Path, damaged: list[tuple[Path, str]], tell: Callable[[str], None], layout: Layout
) -> None:
    """Rank 0: rename what the run must not go on from, now that another checkpoint is loaded."""
    if not layout.is_controller:
        return
    for folder, message in damaged:
        tell(
            f"warning: {message}; {folder.name} was renamed to {rename(folder, CORRUPT).name}, and the run goes on from {path.name}"
        )
    if is_chosen(config, path):
        for moved in take(config, path):
            tell(f"{moved.with_suffix('')} was renamed to {moved.name}, since checkpoint.resume chose {path.name}")
