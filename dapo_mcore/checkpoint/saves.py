"""The checkpoints that a run saves: at once, or beside training. At most one is in flight.

Change here: when a save beside training is waited for, and what follows if it has failed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dapo_mcore.actor.actor import Actor
from dapo_mcore.actor.checkpoint_blocks import written_blocks
from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.checkpoint.background import SaverProcess
from dapo_mcore.checkpoint.best import Best
from dapo_mcore.checkpoint.checkpoint import abandon, begin_checkpoint, save_checkpoint
from dapo_mcore.checkpoint.publish import Publication
from dapo_mcore.checkpoint.run_state import TrainState
from dapo_mcore.checkpoint.snapshot import Snapshot
from dapo_mcore.model_files.shard_format import SHARDS

STALL_S = 600.0
"""Seconds without progress after which a save beside training counts as failed."""
_CLOSE_S = 10.0
"""Seconds that a save in flight has when its rank ends early. torchrun kills ranks 30 s after a signal."""


class Saves:
    """Saves one run's checkpoints, on every rank.

    best         which checkpoints are kept beside the newest `keep`; None for none
    background   True for a process beside each rank that writes while training goes on
    """

    def __init__(
        self,
        run_dir: Path,
        layout: Layout,
        keep: int | None,
        warn: Callable[[str], None] = print,
        *,
        background: bool = False,
        best: Best | None = None,
    ):
        self._run_dir, self._layout, self._keep, self._warn = run_dir, layout, keep, warn
        self._best = best
        self._saver = SaverProcess() if background else None
        self._in_flight: Publication | None = None

    @property
    def in_flight(self) -> bool:
        """Return True between a `save` that was not waited for and the next `save` or `finish`. The same on all ranks."""
        return self._in_flight is not None

    @property
    def pid(self) -> int | None:
        """Return the number of this rank's process, None if there is none."""
        return self._saver.pid if self._saver is not None else None

    def save(self, actor: Actor, state: TrainState | None, *, wait: bool = True) -> Path:
        """Save a checkpoint and return its folder, which exists when this returns, or with `wait` False after `finish`.

        `state` comes from rank 0, the others give None. If the save before it failed, a line says so, and this one is waited for.
        Raise CheckpointError and TrainingError as save_checkpoint does. Collectives: every rank must call it.
        """
        if problem := self.finish():
            self._warn(f"warning: {problem}; the next one is written at once, and training waits for it")
        if self._saver is None or wait or problem:
            return save_checkpoint(self._run_dir, actor, state, self._layout, self._keep, self._warn, self._best)
        job, blocks = begin_checkpoint(self._run_dir, actor, state, self._layout, self._keep, self._best)
        rank = self._layout.rank
        publication = job if self._layout.is_controller else None
        try:
            snapshot = Snapshot(written_blocks(blocks))
            self._layout.on_every_rank_or_raise(
                lambda: self._saver.start(snapshot, str(job.partial / SHARDS), rank, publication)
            )
        except Exception:  # on every rank, whatever the reason
            self._give_up(job)
            raise
        self._in_flight = job
        return job.folder

    def finish(self) -> str | None:
        """Wait for the save in flight. Return what is to be told if any rank's part or the publishing failed, on every rank; None
        if all went well, or if there was none. Nothing of a failed one is visible. Collectives: every rank must call it.
        """
        if self._in_flight is None:
            return None
        assert self._saver is not None
        job, self._in_flight = self._in_flight, None
        problem = self._first(self._saver.wait("written", STALL_S))
        if problem is None:
            problem = self._first(self._saver.wait("done", STALL_S) if self._layout.is_controller else None)
        for line in self._saver.warnings:
            self._warn(line)
        if problem is not None:
            self._give_up(job)
            problem = f"the checkpoint {job.folder} was not saved beside training, since rank {problem[0]} failed: {problem[1]}"
        return problem

    def close(self) -> None:
        """End the process, without any other rank. A save in flight may end first, for some seconds. May be called twice."""
        if self._saver is not None:
            self._saver.close(_CLOSE_S if self._in_flight is not None else 0.0)

    def _first(self, problem: str | None) -> Any:
        """Return (rank, problem) of the first rank that has one, on every rank; None if there is none."""
        found = [(rank, told) for rank, told in enumerate(self._layout.gather_objects(problem)) if told is not None]
        return self._layout.broadcast_object(found[0] if found else None)

    def _give_up(self, job: Publication) -> None:
        """Replace the processes, which may still be at work, then delete what they wrote."""
        assert self._saver is not None
        self._saver.close()
        self._saver = SaverProcess()
        self._layout.barrier()
        abandon(job, self._layout)
