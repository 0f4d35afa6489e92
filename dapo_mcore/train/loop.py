"""The training loop.

    prompts → rollout → reward → filter (refill) → scatter → score → gradient steps → weight sync → next

Every rank runs the same loop. Rank 0 is also the controller, which rolls out, rewards, evaluates and reports; the others
wait for its samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from dapo_mcore.actor import layout as layouts
from dapo_mcore.actor.actor import Actor
from dapo_mcore.actor.layout import Layout
from dapo_mcore.actor.learner import Learner
from dapo_mcore.actor.metrics import UpdateSums, update_metrics
from dapo_mcore.actor.replicas import check_replicas
from dapo_mcore.actor.scatter import scatter_step
from dapo_mcore.config import Config
from dapo_mcore.controller import Controller, final_export, finished_step, pad_token
from dapo_mcore.data.model_folder import check_tokenizer_fits, load_hf_config, load_tokenizer
from dapo_mcore.ending import Ending
from dapo_mcore.handover import Handover
from dapo_mcore.observe.progress import NullProgress, Progress
from dapo_mcore.observe.timing import PhaseTimer
from dapo_mcore.warm_start import warm_start
from dapo_mcore.weights.checkpoint import load_checkpoint, save_checkpoint
from dapo_mcore.weights.checkpoint_folder import latest_checkpoint
from dapo_mcore.weights.hf_io import open_weights, save_hf_folder


def train(config: Config) -> None:
    """One run from start or resume to export. Every rank of the job must call it.

    Raises Interrupted on rank 0 after SIGINT, SIGTERM or SIGHUP; the other ranks have nothing to clean up, and leave these
    signals alone.
    """
    layout = layouts.start(config.parallel, config.seed)
    ending = Ending(partial(_how_to_go_on, config)) if layout.is_controller else None
    try:
        with ending or nullcontext():
            done = layout.broadcast_object(finished_step(config) if ending else None)
            if done is None:
                with Progress(config.name, config.num_rollout_steps) if ending else NullProgress() as progress:
                    Run(config, layout, progress, ending).loop()
            elif ending:
                print(
                    f"nothing to do, and nothing changed: rollout step {done} of {config.run_dir} is done, and "
                    f"num_rollout_steps is {config.num_rollout_steps}; raise it to go on, or set checkpoint.resume never "
                    "to start anew"
                )
    finally:
        if ending is None or ending.signum is None:  # else the others are gone, and leaving the job may wait for them
            layouts.stop()


def _how_to_go_on(config: Config) -> str:
    path = latest_checkpoint(config.run_dir)
    if path is None:
        every = config.checkpoint.every
        return f"there is no checkpoint yet (checkpoint.every {every or 'null'}); the next start begins anew"
    how = "the same command" if config.checkpoint.resume == "auto" else "checkpoint.resume=auto"
    return f"the last checkpoint is {path}; {how} goes on from there"


class Run:
    """Everything one rank holds during a run; `loop` is the run."""

    def __init__(self, config: Config, layout: Layout, progress: NullProgress, ending: Ending | None):
        """`ending` is told of the controller as soon as there is one: building the rest may fail, on any rank."""
        self.config, self.layout, self.progress, self.timer = config, layout, progress, PhaseTimer()
        with self._phase("start"):
            self.hf_config = load_hf_config(config.model)
            tokenizer = load_tokenizer(config.model)
            check_tokenizer_fits(tokenizer, self.hf_config)
            self.controller = layout.on_controller_or_raise(lambda: self._open_controller(tokenizer, ending))
            weights = open_weights(config.model, self.hf_config, config.seed)
            self.actor = Actor(config, self.hf_config, layout, weights)
            self.learner = Learner(self.actor, pad_token(tokenizer))
            shared = config.rollout.engine == "sglang" and config.rollout.sglang.colocated
            engine = self.controller and self.controller.engine
            self.handover = Handover(self.actor, engine, layout, colocated=shared)

    def loop(self) -> None:
        """All rollout steps."""
        with self._phase("start"):
            last, first = self.config.num_rollout_steps, self._resume_or_start()
        if first == 1 and self.config.eval.at_start:
            self._attended(lambda c: c.record_start())
        for step in range(first, last + 1):
            metrics = self._train_step(step)
            if step % self.config.eval.every == 0 or step == last:
                metrics |= self._attended(lambda c, step=step: c.evaluate(step)) or {}
            # recorded before it is saved: a run killed in between repeats the step instead of losing its row
            self._on_controller(lambda c, step=step, metrics=metrics: c.record(step, self.actor.num_updates, metrics))
            self._save(step)
        self.actor.skips.check_trained()
        export = None
        if self.config.checkpoint.export_at_end:
            self.handover.to_training()
            export = self._export(final_export(self.config), max(first - 1, last))
        self._on_controller(lambda c: c.finish(export))

    def _train_step(self, step: int) -> dict[str, float]:
        """One rollout step: rollout, gradient steps, weight sync.

        With rollout.async_steps the next step's rollout goes on beside the gradient steps, and is waited for before the sync,
        unless sampling.on_full keep lets requests live on under the new weights.
        """
        config = self.config
        batch = self._attended(lambda c: c.rollout(step))
        seed = config.seed + step if config.batch.shuffle else None
        with self._phase("sync"):
            self.handover.to_training()
        with self._phase("logprob"):
            share = scatter_step(
                batch, config, self.layout, mini_batch_prompts=config.batch.mini_batch_prompts, seed=seed
            )
            scored = self.learner.score(share)
        with self._phase("train"):
            updates = self.learner.update(scored.mini_batches)
            if config.parallel.check_replicas:
                check_replicas(self.actor.policy, self.actor.shape, self.layout)
        self._tell_skips(updates)
        self._on_controller(lambda c: c.finish_rollout())
        with self._phase("sync"):
            self.handover.to_rollout(version=step)
        return update_metrics(updates) | scored.metrics | self.handover.pop_metrics()

    def _tell_skips(self, updates: Sequence[UpdateSums]) -> None:
        if skipped := sum(update.skipped for update in updates):
            self.progress.line(
                f"warning: {skipped} of this rollout step's {len(updates)} gradient steps were skipped, since a gradient was "
                f"not finite on some rank; optimizer.max_skipped_updates {self.config.optimizer.max_skipped_updates} in a row "
                f"end the run"
            )

    def _resume_or_start(self) -> int:
        """The number of the first rollout step to run, with weights, data position and engine in place for it."""
        path = latest_checkpoint(self.config.run_dir) if self.config.checkpoint.resume == "auto" else None
        path = self.layout.broadcast_object(path)
        if path is None:
            return self._start()
        state = load_checkpoint(path, self.actor, self.layout)
        self.handover.to_rollout(version=state.weight_version)
        self._on_controller(lambda c: c.resume(state))
        self.progress.line(f"resumed after rollout step {state.step} from {path}")
        return state.step + 1

    def _start(self) -> int:
        self._on_controller(lambda c: c.open_run(resume_step=None))
        if self.config.warm_start is not None:
            warm_start(self.config, self.learner, self.handover, self.controller, self.layout)
        self.handover.to_rollout(version=0)
        return 1

    def _open_controller(self, tokenizer: Any, ending: Ending | None) -> Controller | None:
        """Rank 0's controller, None elsewhere."""
        if ending is None:
            return None
        controller = Controller(
            self.config, self.hf_config, tokenizer, self.progress, self.timer, layouts.num_local_ranks()
        )
        ending.clean = controller.close
        return controller

    def _save(self, step: int) -> None:
        checkpoint, last = self.config.checkpoint, step == self.config.num_rollout_steps
        saves = checkpoint.every and (last or step % checkpoint.every == 0)
        exports = checkpoint.export_every and step % checkpoint.export_every == 0
        if not (saves or exports):
            return
        with self._phase("save"), self.handover.borrowed():
            if saves:
                state = self.controller.train_state(step, self.actor.num_updates) if self.controller else None
                save_checkpoint(
                    self.config.run_dir, self.actor, state, self.layout, checkpoint.keep, self.progress.line
                )
            if exports:
                self._export(self.config.run_dir / "hf" / f"step_{step:06d}", step)

    def _export(self, folder: Path, step: int) -> Path:
        """Writes an HF folder; every rank takes part in gathering the weights."""
        if self.layout.is_controller:
            save_hf_folder(
                self.handover.stream(),
                folder,
                shape=self.actor.shape,
                dtype=self.actor.policy.config.params_dtype,
                hf_config=self.hf_config,
                source=self.config.model.path,
                step=step,
            )
        else:
            for _ in self.handover.stream():
                pass
        self.layout.barrier()
        return folder

    def _phase(self, name: str) -> Any:
        self.progress.phase(name)
        return self.timer.phase(name)

    def _attended(self, action: Callable[[Controller], Any]) -> Any:
        """`_on_controller` of what generates: meanwhile every rank is there to sync weights again."""
        return self.handover.attend(lambda: action(self.controller) if self.controller else None)

    def _on_controller(self, action: Callable[[Controller], Any]) -> Any:
        return self.layout.on_controller_or_raise(lambda: action(self.controller) if self.controller else None)
