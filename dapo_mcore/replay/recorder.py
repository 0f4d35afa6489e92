"""Records the rollout steps of a run while it trains: one call beside each stage of a step.

Change here: when a part of the record is made. Its fields are record.py's, its digests digest.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dapo_mcore.actor.actor import Actor
from dapo_mcore.actor.learner import ScoredStep
from dapo_mcore.actor.metrics import UpdateStats
from dapo_mcore.actor.scatter import ScatteredStep
from dapo_mcore.config.file import dump_config
from dapo_mcore.config.schema import Config
from dapo_mcore.observe.sinks import attempt
from dapo_mcore.observe.timing import PhaseTimer
from dapo_mcore.replay import record as records
from dapo_mcore.replay.digest import Digester
from dapo_mcore.replay.record import BatchRecord, PromptRecord, Sources, StartRecord, StepRecord, UpdateRecord
from dapo_mcore.replay.setting import current_setting
from dapo_mcore.types import MicroBatch, TrainBatch


class NullRecorder:
    """Keeps nothing and costs nothing. Every rank calls the methods in the order of a step."""

    def start(self, after_step: int) -> None:
        """Begin to record a run that goes on after rollout step `after_step`."""

    def add_batch(self, step: int, share: ScatteredStep, seed: int | None, batch: TrainBatch | None) -> None:
        """Take what the step trains on; `seed` is that of scatter_step, `batch` None on all ranks but 0."""

    def add_scores(self, scored: ScoredStep) -> None:
        """Take the micro-batches with all that the gradient steps read."""

    def add_update(self, stats: UpdateStats) -> None:
        """Take a gradient step before the weights change."""

    def finish(self) -> None:
        """Write the step's record, once all its gradient steps are done."""


def open_recorder(
    config: Config, actor: Actor, sources: Callable[[], Sources | None], tell: Callable[[str], None], timer: PhaseTimer
) -> NullRecorder:
    """Return the recorder that the configuration asks for. `sources` returns, on rank 0, those of the last batch; `timer` gets the
    time as phase `record`."""
    if not config.observe.record:
        return NullRecorder()
    return Recorder(config, actor, config.run_dir, tell, sources, timer)


@dataclass(slots=True)
class _Step:
    """What is known so far of the step that is being trained. offsets: int64 [B+1], of its samples."""

    number: int
    seed: int | None
    share: ScatteredStep
    prompts: list[PromptRecord]
    partial: Path | None
    offsets: torch.Tensor
    inputs: records.Digests
    mini_batches: list[list[MicroBatch]]
    updates: list[UpdateRecord]


def _timed(method: Callable[..., None]) -> Callable[..., None]:
    """Return the method of a Recorder, with its time counted as phase `record`."""

    @wraps(method)
    def timed(recorder: Recorder, *arguments: Any, **named: Any) -> None:
        with recorder._timer.phase("record"):
            method(recorder, *arguments, **named)

    return timed


class Recorder(NullRecorder):
    """Writes a record of each rollout step into `folder`. Its methods are collective: see Digester.

    sources  returns where the samples of the last batch come from; None leaves the batch out of the record.
    timer    gets the time that training waits for the record, as phase `record`.
    If the disk refuses a record, `tell` gets a line and training goes on.
    """

    def __init__(
        self,
        config: Config,
        actor: Actor,
        folder: Path,
        tell: Callable[[str], None],
        sources: Callable[[], Sources | None] = lambda: None,
        timer: PhaseTimer | None = None,
    ):
        self._config, self._actor, self._layout, self._folder = config, actor, actor.layout, folder
        self._tell, self._sources, self._timer = tell, sources, timer or PhaseTimer()
        self._digester = Digester(actor)
        self._step: _Step | None = None

    @_timed
    def start(self, after_step: int) -> None:
        setting, weights = current_setting(self._config, self._layout), self._digester.weights()
        record = StartRecord(after_step, self._actor.num_updates, setting, weights)
        self._on_disk(partial(_write_start, self._folder, record, dump_config(self._config)))

    @_timed
    def add_batch(self, step: int, share: ScatteredStep, seed: int | None, batch: TrainBatch | None) -> None:
        sources = self._sources()

        def write() -> Path | None:
            has_origins = batch is not None and sources is not None
            return records.write_batch(self._folder, step, BatchRecord(batch, sources.origins)) if has_origins else None

        path = self._on_disk(write)
        offsets = np.concatenate([[0], np.cumsum(share.metadata.lengths)])
        prompts = sources.prompts if sources is not None else []
        self._step = _Step(step, seed, share, prompts, path, torch.from_numpy(offsets), {}, [], [])

    @_timed
    def add_scores(self, scored: ScoredStep) -> None:
        step = self._step
        assert step is not None, "add_batch comes first"
        step.mini_batches = scored.mini_batches
        step.inputs = self._digester.inputs([micro for mini in scored.mini_batches for micro in mini], step.offsets)

    @_timed
    def add_update(self, stats: UpdateStats) -> None:
        step = self._step
        assert step is not None, "add_batch comes first"
        mini_batch = step.mini_batches[len(step.updates) % len(step.mini_batches)]
        gradients = self._digester.gradients(mini_batch, stats.logprobs, step.offsets)
        logprobs = gradients.pop("logprobs")
        step.updates.append(UpdateRecord(_metrics(stats), stats.skipped, logprobs, gradients))

    @_timed
    def finish(self) -> None:
        step, self._step = self._step, None
        assert step is not None, "add_batch comes first"
        record = StepRecord(
            step=step.number,
            num_updates=self._actor.num_updates,
            shuffle_seed=step.seed,
            prompts=step.prompts,
            plan=[mini.micro for mini in step.share.plan],
            inputs=step.inputs,
            updates=step.updates,
            weights=self._digester.weights(),
        )
        self._on_disk(partial(self._write_step, record, step.partial))

    def _write_step(self, record: StepRecord, path: Path | None) -> None:
        records.write_step(self._folder, record, path)
        if keep := self._config.observe.record_keep:
            records.drop_batches(self._folder, record.step, keep)

    def _on_disk(self, action: Callable[[], Path | None]) -> Path | None:
        """Call the action on rank 0. If the disk refuses it, tell so and return None. Collective: one gloo broadcast."""
        found: list[Path | None] = []

        def write() -> None:
            if self._layout.is_controller:
                attempt("record the run", lambda: found.append(action()), self._tell)

        self._layout.on_controller_or_raise(write)
        return found[0] if found else None


def _write_start(folder: Path, record: StartRecord, config: str) -> None:
    records.forget_after(folder, record.after_step)
    records.write_start(folder, record, config)


def _metrics(stats: UpdateStats) -> dict[str, float]:
    more = {"grad_norm": stats.grad_norm, "lr": stats.lr}
    if stats.aux_loss is not None:
        more["aux_loss"] = stats.aux_loss
    return {**stats.sums, **stats.maxima, **more}
