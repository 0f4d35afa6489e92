"""Repeats recorded rollout steps on any parallel layout, and compares all that comes out with the records.

    recorded batch → scatter → score → gradient steps → digests → compare with the record

Change here: which steps are repeated, and what they start from. What is compared is compare.py's. Nothing is generated or
scored by a reward, and nothing is written into the run's folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dapo_mcore.actor.actor import Actor
from dapo_mcore.actor.learner import Learner
from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.actor.scatter import scatter_step
from dapo_mcore.actor.skipped_batch import SKIPPED
from dapo_mcore.checkpoint.checkpoint import load_checkpoint
from dapo_mcore.checkpoint.run_folder import latest_checkpoint, step_of
from dapo_mcore.config.schema import Config
from dapo_mcore.errors import RecordError
from dapo_mcore.model_files.hf_config import load_hf_config, load_tokenizer, pad_token
from dapo_mcore.model_files.hf_folder import open_weights
from dapo_mcore.replay import record as records
from dapo_mcore.replay.compare import Check, Terms, compare_digests, compare_training
from dapo_mcore.replay.record import BatchRecord, Digests, Setting, Sources, StepRecord
from dapo_mcore.replay.recorder import Recorder
from dapo_mcore.replay.setting import current_setting

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Repeated:
    """A repeated step: what was compared, in causal order. Step 0 or that of a checkpoint: only the weights to start from."""

    step: int
    checks: list[Check]


class Replay:
    """A repetition of the run in `run_dir`. Every rank calls the methods in the same order; only rank 0 reads and compares.

    config  the recorded one, with another layout or other overrides.
    out     a folder that gets the records of the repeated steps.
    """

    def __init__(self, config: Config, run_dir: Path, out: Path, layout: Layout, tell: Callable[[str], None]):
        self._config, self._run_dir, self._out, self._layout = config, run_dir, out, layout
        self.setting = current_setting(config, layout)
        hf_config = load_hf_config(config.model)
        self._actor = Actor(config, hf_config, layout, open_weights(config.model, hf_config, config.seed))
        self._learner = Learner(self._actor, pad_token(load_tokenizer(config.model)), skipped=out / SKIPPED)
        self._sources: Sources | None = None
        self._recorder = Recorder(config, self._actor, out, tell, sources=lambda: self._sources)

    def load(self, step: int) -> Repeated:
        """Load the newest weights before rollout step `step`, and compare them with those that are recorded.

        Raise RecordError, on every rank, if there are none that the steps up to `step` can be repeated from.
        """
        path = self._layout.broadcast_object(self._on_controller(lambda: self._checkpoint(step)))
        if path is not None:
            load_checkpoint(path, self._actor, self._layout)
        after = step_of(path) if path is not None else 0
        self._recorder.start(after)
        return Repeated(after, self._on_controller(lambda: self._compare_start(after, step)) or [])

    def repeat(self, step: int) -> Repeated:
        """Repeat a rollout step after the one before it, and compare it with its record."""
        recorded = self._on_controller(lambda: records.read_step(self._run_dir, step))
        given = self._on_controller(lambda: records.read_batch(self._run_dir, step))
        seed = self._layout.broadcast_object(recorded.shuffle_seed if recorded is not None else None)
        if recorded is not None and given is not None:
            self._sources = Sources(recorded.prompts, given.origins)
        self._train(step, given, seed)
        return Repeated(step, self._on_controller(lambda: self._compare(recorded, step)) or [])

    def _train(self, step: int, given: BatchRecord | None, seed: int | None) -> None:
        """Do what the training loop does with a batch."""
        batch, mini_batch_prompts = given.batch if given is not None else None, self._config.batch.mini_batch_prompts
        share = scatter_step(batch, self._config, self._layout, mini_batch_prompts=mini_batch_prompts, seed=seed)
        self._recorder.add_batch(step, share, seed, batch=None)
        scored = self._learner.score(share)
        self._recorder.add_scores(scored)
        self._learner.train(scored, step, watch=self._recorder.add_update)
        self._recorder.finish()

    def _checkpoint(self, step: int) -> Path | None:
        """Return the checkpoint to start from, None for the weights of the run's start. Raise RecordError if neither will do."""
        path = latest_checkpoint(self._run_dir, before=step)
        after = step_of(path) if path is not None else 0
        if path is None and self._config.warm_start is not None:
            raise RecordError(
                f"{self._run_dir} has no checkpoint before rollout step {step}, and a replay does not repeat the warm start; "
                "replay a step after a checkpoint, and save more often (checkpoint.every, checkpoint.keep)"
            )
        records.read_step(self._run_dir, step)
        if gone := [str(s) for s in range(after + 1, step + 1) if not records.has_batch(self._run_dir, s)]:
            raise RecordError(
                f"the newest weights before rollout step {step} are those after step {after}, but the batches of steps "
                f"{', '.join(gone)} are not in {records.record_folder(self._run_dir)}; raise observe.record_keep, or save "
                "more often"
            )
        starts = {max(s for s in records.recorded_starts(self._run_dir) if s < n) for n in range(after + 1, step + 1)}
        if len({records.config_path(self._run_dir, start).read_bytes() for start in starts}) > 1:
            raise RecordError(
                f"the configuration changed after rollout step {max(starts)}, and there is no checkpoint between it and step "
                f"{step} to start from; replay a step after a later checkpoint"
            )
        return path

    def _compare_start(self, after: int, step: int) -> list[Check]:
        start = records.read_start(self._run_dir, step)
        recorded: Digests | None = start.weights if start.after_step == after else None
        if recorded is None and after in records.recorded_steps(self._run_dir):
            recorded = records.read_step(self._run_dir, after).weights
        found = records.read_start(self._out, after + 1).weights
        terms = Terms(same_layout=True, exact=True, rounding=0.0)  # nothing is computed yet
        return [] if recorded is None else [compare_digests("weights before", recorded, found, terms)]

    def _compare(self, recorded: StepRecord | None, step: int) -> list[Check]:
        assert recorded is not None, "rank 0 has read it"
        terms = self._terms(records.read_start(self._run_dir, step).setting)
        return compare_training(recorded, records.read_step(self._out, step), terms)

    def _terms(self, recorded: Setting) -> Terms:
        """Return the terms of a comparison: on the same layout, every bit should be the same."""
        terms = Terms.of(recorded, self.setting, self._config.model.dtype)
        return Terms(terms.same_layout, exact=terms.same_layout, rounding=terms.rounding)

    def _on_controller(self, action: Callable[[], T]) -> T | None:
        return self._layout.on_controller_or_raise(lambda: action() if self._layout.is_controller else None)
