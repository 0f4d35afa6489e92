"""The folders of a run's checkpoints: their names, how one becomes visible at once, and how old ones go.

Change here: how a folder is made, published and deleted. checkpoint.py writes its contents.

    run_dir/checkpoints/step_000012                    a whole checkpoint
                        step_000016.1a2b3c4d.partial   one that is being written, or was when its run ended
                        step_000008.deleted            one that could not be deleted so far
"""

from __future__ import annotations

import itertools
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from dapo_mcore.model_files.disk import sync_to_disk

_DELETED, _PARTIAL = ".deleted", ".partial"


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:06d}"


def new_partial(folder: Path) -> Path:
    """Make an empty folder in which `folder` is written, with a name that no attempt had before.

    Delete those of attempts that failed; one that cannot be deleted only takes space.
    """
    for left in folder.parent.glob(f"*{_PARTIAL}"):
        with suppress(OSError):
            remove(left)
    partial = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}{_PARTIAL}")
    partial.mkdir(parents=True)
    return partial


def step_of(path: Path) -> int:
    """Return the rollout steps done in a checkpoint, by its name."""
    return int(path.name.removeprefix("step_"))


def is_name(name: str) -> bool:
    """Return True if this is the name of a whole checkpoint's folder."""
    return re.fullmatch(r"step_\d{6,}", name) is not None


def all_checkpoints(run_dir: Path) -> list[Path]:
    """Return whole checkpoints, oldest step first."""
    folder = run_dir / "checkpoints"
    found = [path for path in folder.iterdir() if is_name(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def latest_checkpoint(run_dir: Path, before: int | None = None) -> Path | None:
    """Return the whole checkpoint with the highest step (below `before`), or None. Ranks may see a shared disk differently:
    ask rank 0."""
    return next((path for path in reversed(all_checkpoints(run_dir)) if before is None or step_of(path) < before), None)


def commit(partial: Path, folder: Path) -> None:
    """Give a finished folder its name, all at once. A checkpoint that has this name already is replaced."""
    sync_to_disk(partial)
    if os.path.lexists(folder):
        rename(folder, _DELETED)
    os.rename(partial, folder)
    sync_to_disk(folder.parent)


def drop_old(newest: Path, keep: int | None, warn: Callable[[str], None], best: Collection[Path] = ()) -> None:
    """Delete all checkpoints but `newest`, the latest `keep` - 1 others (None: all), and the `best`. A failure costs a warning,
    and is tried again after the next checkpoint. The target of a symbolic link is left alone."""
    others = [path for path in all_checkpoints(newest.parents[1]) if path != newest]
    for path in others[: 0 if keep is None else max(0, len(others) + 1 - keep)]:
        if path in best:
            continue
        # by another name first: a folder that is half deleted must not look like a checkpoint
        _or_warn(lambda path=path: rename(path, _DELETED), path, warn)
    for path in newest.parent.glob(f"step_*{_DELETED}*"):
        _or_warn(lambda path=path: remove(path), path, warn)


def remove(path: Path) -> None:
    """Delete a folder with all it holds, a file, or a link but not what it points to; nothing if there is none."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def rename(path: Path, suffix: str) -> Path:
    """Add `suffix` to the name, and a number if that name is taken. Return the new path."""
    names = (path.with_name(f"{path.name}{suffix}{number or ''}") for number in itertools.count())
    new = next(name for name in names if not os.path.lexists(name))
    os.rename(path, new)
    return new


def _or_warn(action: Callable[[], object], path: Path, warn: Callable[[str], None]) -> None:
    try:
        action()
    except OSError as error:
        warn(
            f"warning: the old checkpoint {path} cannot be deleted ({error.strerror or error}): training goes on, and the "
            f"next checkpoint tries again"
        )
