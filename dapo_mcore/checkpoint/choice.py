"""Which checkpoint a start goes on from: the newest one, or the one that checkpoint.resume names.

Change here: how a checkpoint is chosen, and how those that a run must not go on from are set aside. They are renamed, never
deleted.

    run_dir/checkpoints/step_000016.corrupt     a damaged one
                        step_000016.set_aside   one that is newer than the chosen one
                        chosen.json             the chosen one: later starts with the same choice go on from what was saved since
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from dapo_mcore.checkpoint.run_folder import (
    all_checkpoints,
    checkpoint_path,
    is_name,
    latest_checkpoint,
    rename,
    step_of,
)
from dapo_mcore.config.schema import Config
from dapo_mcore.errors import CheckpointError
from dapo_mcore.model_files.disk import sync_to_disk

CORRUPT, SET_ASIDE = ".corrupt", ".set_aside"
_CHOSEN = "chosen.json"


def resumed_checkpoint(config: Config) -> Path | None:
    """Return the checkpoint that a start of this run goes on from, None if it begins anew.

    Raise CheckpointError if checkpoint.resume names one that does not exist. Ranks may see a shared disk differently: ask rank 0.
    """
    if config.checkpoint.resume == "never":
        return None
    chosen, latest = _named(config), latest_checkpoint(config.run_dir)
    if chosen is None or (latest is not None and _taken_before(config)):
        return latest
    if not (is_name(chosen.name) and chosen.is_dir()):
        raise CheckpointError(
            f"checkpoint.resume {config.checkpoint.resume}: {chosen} is no checkpoint; {_those_there(config)}"
        )
    return chosen


def is_chosen(config: Config, path: Path) -> bool:
    """Return True if this start goes back to `path` because checkpoint.resume names it."""
    return path == _named(config) and not _taken_before(config)


def take(config: Config, path: Path) -> list[Path]:
    """Make the chosen checkpoint `path` the one that the run goes on from: set newer ones of this run aside, and note the choice.

    Return the new names. A checkpoint of another run sets all of this run's aside.
    """
    own = all_checkpoints(config.run_dir)
    newer = [
        other for other in own if step_of(other) > step_of(path) or path.resolve().parent != other.resolve().parent
    ]
    moved = [rename(other, SET_ASIDE) for other in newer]
    note = config.run_dir / "checkpoints" / _CHOSEN
    note.parent.mkdir(parents=True, exist_ok=True)
    new = note.with_suffix(".new")
    new.write_text(json.dumps({"resume": config.checkpoint.resume}), encoding="utf-8")
    sync_to_disk(new)
    os.replace(new, note)
    sync_to_disk(note.parent)
    return moved


def _named(config: Config) -> Path | None:
    """Return the checkpoint that checkpoint.resume names, None if it names none."""
    resume = config.checkpoint.resume
    if isinstance(resume, int):
        return checkpoint_path(config.run_dir, resume)
    return None if resume in ("auto", "never") else Path(os.path.abspath(resume))


def _taken_before(config: Config) -> bool:
    """Return True if an earlier start has gone back to what checkpoint.resume names."""
    path = config.run_dir / "checkpoints" / _CHOSEN
    if not path.is_file():
        return False
    try:
        return bool(json.loads(path.read_bytes())["resume"] == config.checkpoint.resume)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged; delete it, and the next start goes back to what checkpoint.resume names"
        ) from error


def _those_there(config: Config) -> str:
    steps = [str(step_of(path)) for path in all_checkpoints(config.run_dir)]
    return f"{config.run_dir} has those of rollout steps {', '.join(steps)}" if steps else f"{config.run_dir} has none"
