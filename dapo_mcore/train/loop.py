"""The training loop.

    prompts → rollout → reward → filter (refill) → scatter → score → gradient steps → weight sync → next

Every rank runs the same loop. Rank 0 is also the controller: it generates, scores, evaluates and reports. The other
ranks wait for its samples.

Change here: the order of the stages. What a stage does is in its own folder.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import psutil

from dapo_mcore.actor.actor import Actor
from dapo_mcore.actor.critic import critic_metrics
from dapo_mcore.actor.learner import Learner
from dapo_mcore.actor.memory_use import MemoryUse
from dapo_mcore.actor.metrics import update_metrics
from dapo_mcore.actor.model.fp8_rules import check_same_on_all_ranks
from dapo_mcore.actor.not_finite import check_weights
from dapo_mcore.actor.parallel import layout as layouts
from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.actor.replicas import check_replicas
from dapo_mcore.actor.scatter import scatter_step
from dapo_mcore.algo.correction import mismatch_warning
from dapo_mcore.checkpoint.best import Best
from dapo_mcore.checkpoint.resume import load_resumed
from dapo_mcore.checkpoint.saves import Saves
from dapo_mcore.config.schema import Config
from dapo_mcore.controller import Controller
from dapo_mcore.earlier_run import final_export
from dapo_mcore.errors import output_error
from dapo_mcore.handover import Handover
from dapo_mcore.model_files.hf_config import check_tokenizer_fits, load_hf_config, load_tokenizer, pad_token
from dapo_mcore.model_files.hf_folder import open_weights
from dapo_mcore.model_files.model_folder import check_same_folder, model_folder
from dapo_mcore.observe.profile import profiled
from dapo_mcore.observe.progress import NullProgress
from dapo_mcore.observe.timing import PhaseTimer
from dapo_mcore.process.launcher import is_torchrun, routed_address, shutdown_timeout_note
from dapo_mcore.process.run_lock import RunLock
from dapo_mcore.process.signals import Interrupted, Shutdown, Stop
from dapo_mcore.process.stop_file import STOP, StopFile
from dapo_mcore.replay.recorder import open_recorder
from dapo_mcore.rollout.build import build_peer
from dapo_mcore.rollout.sglang.launch.node_servers import Node, NodeHost
from dapo_mcore.train.leaders import open_leaders
from dapo_mcore.train.outputs import Outputs, how_to_go_on
from dapo_mcore.warm_start import warm_start


class Run:
    """Everything that one rank holds during a run. `loop` runs it."""

    def __init__(self, config: Config, layout: Layout, progress: NullProgress, shutdown: Shutdown):
        """Register all that must be cleaned up with `shutdown` as soon as it exists: building may fail, on any rank."""
        self.config, self.layout, self.progress, self.timer = config, layout, progress, PhaseTimer()
        self.shutdown = shutdown
        self.last = config.num_rollout_steps  # None until the last epoch is over
        self.outputs: Outputs | None = None  # until all is built
        self.stop_file: StopFile | None = None  # on rank 0
        self.node: NodeHost | None = None  # on the first rank of each node, for servers there
        with self._phase("start"):
            if config.model.fp8:
                check_same_on_all_ranks(config.model.fp8, layout)
            folders: list[Any] = layout.gather_objects(model_folder(config.model).name)
            layout.on_controller_or_raise(lambda: check_same_folder(config.model, folders))
            self.hf_config = load_hf_config(config.model)
            tokenizer = load_tokenizer(config.model)
            check_tokenizer_fits(tokenizer, self.hf_config)
            saves = self._open_saves()
            nodes = self._open_nodes()
            relay = build_peer(config, layout.first_ranks_of_nodes(), layout.device)
            self.controller = layout.on_controller_or_raise(lambda: self._open_controller(tokenizer, nodes, relay))
            weights = open_weights(config.model, self.hf_config, config.seed)
            self.actor = Actor(config, self.hf_config, layout, weights)
            self.learner = Learner(self.actor, pad_token(tokenizer), self.progress.line)
            self.recorder = open_recorder(
                config, self.actor, lambda: self.controller and self.controller.sources, self.progress.line, self.timer
            )
            self.memory = MemoryUse(self.actor)
            self.progress.line(self.memory.start_line())
            shared = config.rollout.engine == "sglang" and config.rollout.sglang.colocated
            engine = self.controller and self.controller.engine
            leaders, leader = open_leaders(config, self.hf_config, layout, engine, self.progress.line)
            self.handover = Handover(
                self.actor,
                engine,
                layout,
                colocated=shared,
                peer=relay or leader,
                leaders=leaders,
                run_interruptible=self.shutdown.run_interruptible,
            )
            self.outputs = self._open_outputs(saves)

    def loop(self) -> None:
        """Run all rollout steps and export the model. Raise Interrupted if a signal has stopped them early; return if the stop file
        has."""
        with self._phase("start"):
            first = self._resume_or_start()
            self._learn_last()
        # what would not be saved is not worth waiting for
        with self.shutdown.defer_signals(self._notice) if self.config.checkpoint.at_end else nullcontext():
            stop = self._steps(first)
        if stop is not None:
            if stop.signum is not None:
                self.layout.beacon.leave()
                raise Interrupted(stop.signum)
            if self.layout.is_controller:
                self.progress.line(f"stopped by the file {STOP}: {how_to_go_on(self.config)}")
            return
        self.actor.guard.check_trained()
        self.outputs.finish()
        export = None
        if self.config.checkpoint.export_at_end:
            self.handover.to_training()
            assert self.last is not None
            done = max(first - 1, self.last)
            export = self.outputs.export(final_export(self.config), done, self.config.num_epochs)
        self._on_controller(lambda c: c.finish(export))

    def _steps(self, first: int) -> Stop | None:
        """Run the rollout steps from `first` on. Return what has ended them early, with the last completed step saved, or None."""
        if first == 1 and self.config.eval.at_start:
            self._attended(lambda c: c.record_start())
        if first > 1 and self._evaluates(first - 1):
            self._attended(lambda c: c.make_up_evaluation(first - 1))
        for step in count(first):
            if self._is_over(step):
                return None
            metrics = self._train_step(step)
            if metrics is None and self._is_over(step):
                return self._end_with(step - 1)
            if metrics is None:
                return self._stop_after(step - 1, keeps_rollout=self.config.checkpoint.keep_rollouts)
            if step == first and (warning := mismatch_warning(metrics)):  # later steps may have older samples
                self.progress.line(warning)
            if self._evaluates(step):
                metrics |= self._attended(lambda c, step=step: c.evaluate(step)) or {}
            # recorded before it is saved: a run killed in between repeats the step instead of losing its row
            self._on_controller(lambda c, step=step, metrics=metrics: c.record(step, self.actor.num_updates, metrics))
            if self._stop() is not None:
                return self._stop_after(step)
            self.outputs.save_due(step, is_last=step == self.last)

    def _evaluates(self, step: int) -> bool:
        every = self.config.eval.every
        return step == self.last or (every is not None and step % every == 0)

    def _is_over(self, step: int) -> bool:
        return self.last is not None and step > self.last

    def _learn_last(self) -> None:
        """Learn which rollout step is the last, once rank 0 knows. Collective in a run of num_epochs: one gloo broadcast."""
        if self.config.num_epochs is not None:
            self.last = self.layout.broadcast_object(self.controller and self.controller.length.last_step)

    def _end_with(self, step: int) -> Stop | None:
        """Do what is due after the last rollout step, since the prompts after it gave no other. Return what stops it, or None."""
        self._attended(lambda c: c.make_up_evaluation(step))
        if self._stop() is not None:
            return self._stop_after(step, keeps_rollout=True)
        if self.config.checkpoint.at_end:
            self.outputs.save_stopped(step, anew=True)
        return None

    def _train_step(self, step: int) -> dict[str, float] | None:
        """Run one rollout step: rollout, gradient steps, weight sync. Return its metrics, or None if a signal stops the run
        before anything was trained, or the last epoch has left nothing to train on. After a later signal the sync is left out; a
        resumed run does it first.

        With rollout.async_steps the next step is generated beside the gradient steps. The sync waits for it, unless requests
        may continue under new weights (sampling.on_full keep).
        """
        config = self.config
        batch = self._attended(lambda c: c.rollout(step))
        if self._stop() is not None:
            return None
        self._learn_last()
        if self._is_over(step):
            return None
        seed = config.seed + step if config.batch.shuffle else None
        with self._phase("sync"):
            self.handover.to_training()
        with profiled(self._profile(step), self.progress.line):
            with self._phase("logprob"), self.memory.phase("score"):
                share = scatter_step(
                    batch, config, self.layout, mini_batch_prompts=config.batch.mini_batch_prompts, seed=seed
                )
                self.recorder.add_batch(step, share, seed, batch)
                del batch  # 9 bytes per token of the whole step: the ranks have their shares
                scored = self.learner.score(share)
                self.recorder.add_scores(scored)
            if self._stop() is not None:
                return None
            with self._phase("train"), self.memory.phase("update"):
                uids = self.controller.uids if self.controller else ()
                trained = self.learner.train(scored, step, uids, self.recorder.add_update)
                check_weights(self.actor.trained, self.layout)  # before the engine gets them
                self.recorder.finish()
                if config.parallel.check_replicas:
                    for model in self.actor.trained.values():
                        check_replicas(model, self.actor.shape, self.layout)
        memory = self.memory.metrics()  # before the memory may go to servers
        with self.layout.beacon.phase("generate"):
            self._on_controller(lambda c: self.shutdown.run_interruptible(c.finish_rollout))
        if self._stop() is None:
            with self._phase("sync"):
                self.handover.to_rollout(version=step)
        metrics = update_metrics(trained.policy, scored.mismatch) | scored.metrics | critic_metrics(trained.critic)
        return metrics | memory | self.handover.pop_metrics()

    def _profile(self, step: int) -> Path | None:
        """Return the file for this rank's profile of the step; None if there is none."""
        profiles = self.layout.is_controller and step in self.config.observe.profile_steps
        return self.config.run_dir / "profile" / f"step_{step:06d}.json.gz" if profiles else None

    def _stop(self) -> Stop | None:
        """Return what has asked rank 0 to stop, on every rank. Collective: one gloo broadcast."""
        return self.layout.broadcast_object(self.shutdown.stop)

    def _on_stop_file(self) -> None:
        print(f"{self.stop_file.path}: {self._what_follows('')}", file=sys.stderr, flush=True)
        self.shutdown.request_stop()

    def _notice(self) -> str:
        return f"{self._what_follows(shutdown_timeout_note(os.environ))}; a second signal ends it without saving"

    def _what_follows(self, limit: str) -> str:
        took_s = self.outputs and self.outputs.last_save_s
        took = "" if took_s is None else f" (the last save took {took_s:.0f} s)"
        return f"the run saves a checkpoint of the last completed rollout step{took} and ends{limit}"

    def _stop_after(self, step: int, *, keeps_rollout: bool = False) -> Stop:
        """Save rollout step `step` if it is not saved yet, and return what has stopped the run.

        keeps_rollout  save it in any case, with what the next step has generated.
        """
        self.outputs.save_stopped(step, anew=keeps_rollout)
        stop = self._stop()
        if stop.signum is None and self.stop_file is not None:
            self.stop_file.confirm(step)
        return stop

    def _resume_or_start(self) -> int:
        """Load or start the run, and return the number of the first rollout step to run."""
        loaded = load_resumed(self.config, self.actor, self.layout, self.progress.line)
        if loaded is None:
            return self._start()
        path, state = loaded
        self._on_controller(lambda c: c.resume(state))
        self.recorder.start(state.step)
        self.handover.to_rollout(version=state.weight_version)
        self.outputs.saved_step = state.step
        self.progress.line(f"resumed after rollout step {state.step} from {path}")
        return state.step + 1

    def _start(self) -> int:
        self._on_controller(lambda c: c.open_run(resume_step=None))
        if self.config.warm_start is not None:
            warm_start(self.config, self.learner, self.handover, self.controller, self.layout)
        self.recorder.start(after_step=0)
        self.handover.to_rollout(version=0)
        return 1

    def _open_nodes(self) -> list[Node]:
        """Let the first rank of each node start servers there, if that is asked for. Return the nodes, on rank 0."""
        if self.config.rollout.engine != "sglang" or self.config.rollout.sglang.placement != "nodes":
            return []
        token = self.layout.broadcast_object(secrets.token_hex(32) if self.layout.is_controller else None)
        rank, is_first = self.layout.rank, layouts.is_first_of_node()
        self.node = self.layout.on_every_rank_or_raise(
            lambda: NodeHost(routed_address(os.environ), token, rank) if is_first else None
        )
        return [node for node in self.layout.gather_objects(self.node and self.node.node) if node]

    def _open_controller(self, tokenizer: Any, nodes: Sequence[Node], peers: Any) -> Controller | None:
        """Return rank 0's controller, None elsewhere. The run's folder is this run's alone before anything writes there."""
        if not self.layout.is_controller:
            return None
        try:
            lock = RunLock(self.config.run_dir)
        except OSError as error:
            raise output_error(error, f"write to {self.config.run_dir}") from error
        self.shutdown.cleanup.callback(lock.release)
        launcher = psutil.Process(os.getppid() if is_torchrun(os.environ) else None)
        self.stop_file = StopFile(self.config.run_dir, launcher.create_time(), self.progress.line)
        self.stop_file.watch(self._on_stop_file)
        self.shutdown.cleanup.callback(self.stop_file.close)
        controller = Controller(
            self.config,
            self.hf_config,
            tokenizer,
            self.progress,
            self.timer,
            num_local_ranks=layouts.num_local_ranks(),
            num_ranks=self.layout.world_size,
            nodes=nodes,
            peers=peers,
        )
        self.shutdown.cleanup.callback(controller.close)
        return controller

    def _open_saves(self) -> Saves:
        checkpoint = self.config.checkpoint
        best = (
            Best(checkpoint.keep_best, checkpoint.best_metric, checkpoint.best_mode) if checkpoint.keep_best else None
        )
        saves = Saves(
            self.config.run_dir,
            self.layout,
            checkpoint.keep,
            self.progress.line,
            background=checkpoint.async_save,
            best=best,
        )
        self.shutdown.cleanup.callback(saves.close)
        return saves

    def _open_outputs(self, saves: Saves) -> Outputs:
        return Outputs(
            self.config,
            self.hf_config,
            self.actor,
            self.handover,
            self.layout,
            saves,
            train_state=lambda step: self._on_controller(lambda c: c.train_state(step, self.actor.num_updates)),
            phase=self._phase,
            line=self.progress.line,
            stop_token_ids=self.controller.exported_stops if self.controller else (),
        )

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.progress.phase(name)
        with self.timer.phase(name), self.layout.beacon.phase(name):
            yield

    def _attended(self, action: Callable[[Controller], Any]) -> Any:
        """Run an action that may generate on rank 0, and return its result, or None if a signal stops the run. Meanwhile all ranks
        can sync weights again if servers lose them."""
        with self.layout.beacon.phase("generate"):
            return self.handover.attend(lambda: action(self.controller) if self.controller else None)

    def _on_controller(self, action: Callable[[Controller], Any]) -> Any:
        return self.layout.on_controller_or_raise(lambda: action(self.controller) if self.controller else None)
