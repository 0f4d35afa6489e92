"""What an earlier start of a run has left in its folder: all that was asked for, or results that a new run must not mix with its own.

Change here: when a run counts as finished, and what of an earlier one is moved aside.
"""

from __future__ import annotations

from pathlib import Path

from dapo_mcore.checkpoint.choice import is_chosen, resumed_checkpoint
from dapo_mcore.checkpoint.run_folder import step_of
from dapo_mcore.checkpoint.stored import read_stored
from dapo_mcore.config.schema import Config
from dapo_mcore.errors import CheckpointError
from dapo_mcore.model_files.hf_folder import exported_epochs, exported_step
from dapo_mcore.observe.sinks import METRICS_FILE
from dapo_mcore.process.run_lock import LOCK
from dapo_mcore.process.stop_file import STOP
from dapo_mcore.process.watchdog import LOGS
from dapo_mcore.rollout.build import SERVERS


def final_export(config: Config) -> Path:
    """Return the folder of the final export."""
    return config.run_dir / "hf" / "final"


def finished_step(config: Config) -> int | None:
    """Return the last rollout step of a finished run, for which a resume has nothing to do; else None."""
    path = resumed_checkpoint(config)
    if config.checkpoint.resume == "never" or (path is not None and is_chosen(config, path)):
        return None
    saved = step_of(path) if path is not None else None
    # with at_end false the export may be all that there is, or newer
    step = exported_step(final_export(config)) if config.checkpoint.export_at_end else saved
    if step is None or step < (saved or 0):
        return None
    if config.num_rollout_steps is not None:
        return step if step >= config.num_rollout_steps else None
    return step if _has_done_epochs(path, config) else None


def _has_done_epochs(path: Path | None, config: Config) -> bool:
    """Return True if the final export, or else the position of the checkpoint `path`, is the end of the last epoch. A damaged
    checkpoint's is not; resuming tells of it."""
    if config.checkpoint.export_at_end:
        return (exported_epochs(final_export(config)) or 0) >= config.num_epochs
    try:
        state = read_stored(path).train
    except CheckpointError:
        return False
    held = len(state.sampler["groups"]) + len(state.sampler["again"])
    return not held and state.loader["epoch"] >= config.num_epochs


def move_aside(run_dir: Path) -> Path | None:
    """Move the results of an earlier run aside and return their new folder; None if there are none.

    This run's lock stays, and so do the file that asks it to stop, the folder of its servers, and the logs, which its launcher
    may be writing.
    """
    if not _has_results(run_dir):
        return None
    entries = [path for path in run_dir.iterdir() if path.name not in (LOCK, LOGS, SERVERS, STOP)]
    aside = next(path for i in range(1, 10_000) if not (path := run_dir.with_name(f"{run_dir.name}.old{i}")).exists())
    aside.mkdir()
    for path in entries:
        path.rename(aside / path.name)
    return aside


def _has_results(run_dir: Path) -> bool:
    metrics = run_dir / METRICS_FILE
    has_rows = metrics.exists() and metrics.stat().st_size > 0
    return has_rows or any((run_dir / name).exists() for name in ("samples", "checkpoints", "hf"))
