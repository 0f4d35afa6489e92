"""Checks and reads a checkpoint on disk without building the model: is it whole, and what is the position of its run.

Change here: which files make it whole, and what is said of one that is damaged. Nothing imports Megatron, so that
`dapo-mcore config` can report a damaged checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from dapo_mcore.checkpoint.run_folder import latest_checkpoint, step_of
from dapo_mcore.checkpoint.run_state import ARRAYS_FILE, STATE_FILE, RunState, read_state, refuse_wrong_optimizer_state
from dapo_mcore.errors import CheckpointError, DamagedCheckpoint
from dapo_mcore.model_files.manifest import check_manifest
from dapo_mcore.model_files.megatron_folder import MEGATRON, Store, has_shards, open_store
from dapo_mcore.model_files.shard_reader import check_size
from dapo_mcore.model_files.torch_dist import read_companions

T = TypeVar("T")

VISIBLE_S = 120.0
"""A network disk shows another machine's file within its attribute cache's time, by default up to 60 s."""
_OLD_FILES = (f"{MEGATRON}/metadata.json", f"{MEGATRON}/.metadata", f"{MEGATRON}/common.pt", STATE_FILE, ARRAYS_FILE)
"""Of formats 1 and 2, which have no manifest."""


def check_stored(path: Path) -> None:
    """Raise CheckpointError as read_stored does, and for missing or truncated files of tensors, with what a start does then.
    Reads no tensors."""
    try:
        read_stored(path)
        with unreadable_named(path):
            open_store(path)
    except DamagedCheckpoint as error:
        raise CheckpointError(f"{error}; {what_then(path)}") from error


def open_visible(path: Path, patience_s: float = VISIBLE_S) -> Store:
    """Return a reader of a checkpoint that rank 0 has found whole. Waits until this rank's machine sees its files, too: those of
    tensors before their first use.

    Raise CheckpointError if it does not see them within `patience_s` from here on: they are not damaged.
    """
    deadline = time.monotonic() + patience_s

    def seen(look: Callable[[], T]) -> T:
        while True:
            try:
                return look()
            except DamagedCheckpoint as error:
                if time.monotonic() > deadline:
                    raise CheckpointError(
                        f"{error} on this machine, but not on that of rank 0, for {patience_s:.0f} s: put the checkpoint on a "
                        f"disk that every node shares"
                    ) from error
            time.sleep(1.0)

    return seen(lambda: open_store(path, lambda file, num_bytes: seen(lambda: check_size(file, num_bytes))))


def what_then(path: Path) -> str:
    """Return what follows if the newest checkpoint is damaged."""
    before = latest_checkpoint(path.parents[1], before=step_of(path))
    if before is None:
        aside = sorted(path.parent.glob("step_*.set_aside"))
        other = f"rename {aside[-1].name} to {aside[-1].stem} to go on from it, or " if aside else ""
        return f"no older one is beside it: {other}set checkpoint.resume never to start anew; the folder is kept beside the new one"
    return f"a start with checkpoint.resume auto sets {path.name} aside and goes on from {before}"


def read_stored(path: Path) -> RunState:
    """Return all of a checkpoint that is no tensor. Raise DamagedCheckpoint for a missing or damaged file, CheckpointError for a
    format that cannot be resumed and for files that the system refuses."""
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}")
    with unreadable_named(path):
        if not (path / MEGATRON).is_dir() or has_shards(path):
            check_manifest(path)
            return read_state(path)
        return _read_old(path)


def _read_old(path: Path) -> RunState:
    """Return the state of a checkpoint of format 1 or 2."""
    missing = [name for name in _OLD_FILES if not (path / name).is_file()]
    if missing:
        raise DamagedCheckpoint(f"{path} is not a whole checkpoint: it lacks {', '.join(missing)}")
    state, common = read_state(path), read_companions(path / MEGATRON)
    if state.adam_step is None:
        state = replace(state, adam_step=_adam_step(path, common))
    refuse_wrong_optimizer_state(path, state)
    return state


@contextmanager
def unreadable_named(path: Path) -> Iterator[None]:
    """Turn the system's refusal to read a file into CheckpointError. It is no damage: another start may read it."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path} cannot be read: {error.strerror or error}; mend the disk or its rights and start again, or "
            f"take another checkpoint with checkpoint.resume=STEP"
        ) from error


def _adam_step(path: Path, common: dict[str, Any]) -> float:
    """Return Adam's steps from a checkpoint of format 1."""
    try:
        return float(common["optimizer"]["adam_step"])
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedCheckpoint(f"{path / MEGATRON / 'common.pt'} is damaged: it lacks optimizer.adam_step") from error
