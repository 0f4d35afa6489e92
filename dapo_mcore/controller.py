"""Rank 0's side of a run: prompts, rollouts, rewards, evaluation, and everything a run writes or shows.

Change here: what happens on the controller between two gradient phases. It owns no weights of the actor; train/loop.py
connects the two sides. It takes part in no collective. If servers lose the weights while it waits for them, its request waits,
and handover.py syncs again with all ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from dapo_mcore.architecture.flops import forward_flops
from dapo_mcore.batch.collate import to_train_batch
from dapo_mcore.checkpoint.choice import resumed_checkpoint
from dapo_mcore.checkpoint.run_state import TrainState
from dapo_mcore.config.file import dump_config, record_config
from dapo_mcore.config.schema import Config
from dapo_mcore.data.detokenize import decode_responses
from dapo_mcore.data.loader import PromptLoader
from dapo_mcore.data.run_data import load_run_data
from dapo_mcore.data.stops import read_stops
from dapo_mcore.earlier_run import final_export, move_aside
from dapo_mcore.eval import EvalResult, evaluate
from dapo_mcore.model_files.hf_config import pad_token
from dapo_mcore.model_files.hf_folder import check_replaceable
from dapo_mcore.observe.progress import NullProgress
from dapo_mcore.observe.samples import few_answers, write_answers
from dapo_mcore.observe.sinks import MetricSinks, attempt, check_services, read_metrics
from dapo_mcore.observe.throughput import StepWork, card_name, peak_tflops, throughput_metrics
from dapo_mcore.observe.timing import PhaseTimer
from dapo_mcore.replay.record import Sources
from dapo_mcore.replay.recorded_run import changed_keys
from dapo_mcore.reward.by_source import check_sources
from dapo_mcore.reward.trial import build_tried_rewards
from dapo_mcore.rollout.agent.build import open_agent
from dapo_mcore.rollout.build import build_engine
from dapo_mcore.rollout.sampling.ahead import Ahead
from dapo_mcore.rollout.sampling.length import RunLength
from dapo_mcore.rollout.sampling.none_right import why_none_right
from dapo_mcore.rollout.sampling.respond import Responder
from dapo_mcore.rollout.sampling.sampler import Collected, NothingVaries, Position, Sampler, SamplerState
from dapo_mcore.step_report import StepReport
from dapo_mcore.types import Group, Prompt, SamplingParams, TrainBatch

GIB = 2**30


class Controller:
    """Prompts, reward, engine and sampler of a run. Building it finds bad data, rewards and models before anything is trained.

    engine    takes weights.
    answerer  answers prompts: the engine itself or, if there are tools, turns of it with their calls between them.
    """

    def __init__(
        self,
        config: Config,
        hf_config: Any,
        tokenizer: Any,
        progress: NullProgress,
        timer: PhaseTimer,
        *,
        num_local_ranks: int = 1,
        num_ranks: int = 1,
        nodes: Sequence[Any] = (),
        peers: Any = None,
    ):
        self.config, self.progress, self.timer = config, progress, timer
        check_services(config.observe)
        self.decode = partial(decode_responses, tokenizer)
        resumes = resumed_checkpoint(config) is not None
        stops = read_stops(config, tokenizer)
        if stops.told:
            progress.line(stops.told)
        self.exported_stops = stops.exported
        self.agent = open_agent(config, tokenizer, stops)
        self.data = load_run_data(config, hf_config, tokenizer, warm_start=not resumes, tools=self.agent.schemas)
        sets = {found.section: found.prompts for found in self.data.prompt_sets}
        for line in (*self.data.lines(), *check_sources(config, sets)):
            progress.line(line)
        self.eval_sets = {name: found.prompts for name, found in self.data.evaluation.items()}
        self.loader = PromptLoader(self.data.train.prompts, config.seed, config.data.shuffle, config.num_epochs)
        self.reward, self.set_rewards = build_tried_rewards(config, sets)
        # a rollout beside training runs in its own thread, so it has its own timer and its own line on the screen
        beside = config.rollout.async_steps > 0
        self.rollout_progress = progress.beside() if beside else progress
        self.rollout_timer = PhaseTimer() if beside else timer
        self.engine = build_engine(
            config,
            hf_config,
            stop_token_ids=(*stops.token_ids, *self.agent.end_tokens),
            stop_texts=stops.texts,
            pad_token_id=pad_token(tokenizer),
            num_local_ranks=num_local_ranks,
            nodes=nodes,
            peers=peers,
            progress=progress,
        )
        self.answerer = self.agent.on(self.engine)
        self.answerer.on_progress = self.rollout_progress.advance
        self.sampler = Sampler(
            self.answerer, self.loader, self.reward, self.decode, config, self.rollout_progress, self.rollout_timer
        )
        self.length = RunLength(config, len(self.data.train.prompts), progress)
        self.ahead = Ahead(lambda step: self._collect(step, lag=1))
        self.positions: dict[int, Position] = {}  # of the last step and the one before it
        self.sinks: MetricSinks | None = None
        self.report: StepReport | None = None  # of the last rollout step
        self.uids: list[str] = []  # of its groups' prompts
        self.sources: Sources | None = None  # of its batch, if it is recorded
        self.rollout_times: dict[str, float] = {}
        self.flops, self.num_ranks, self.work = forward_flops(hf_config), num_ranks, StepWork(0, 0, 0.0)
        self.last_eval: EvalResult | None = None
        self.num_failures = 0

    def open_run(self, resume_step: int | None) -> None:
        """Open the run's folder, or continue it after `resume_step`. A new run moves an older folder of its name aside."""
        run_dir = self.config.run_dir
        if resume_step is None and (aside := move_aside(run_dir)) is not None:
            self.progress.line(f"an earlier run without a checkpoint to resume was moved to {aside}")
        # after step 0 the first evaluation is repeated, and its row is written again
        self.sinks = MetricSinks(run_dir, self.config.observe, resume_step or None, self.progress.line)
        self.positions = {resume_step or 0: self._position()}
        if (before := record_config(self.config, run_dir, resume_step or 0)) is not None:
            told = changed_keys(before, self.config)
            self.progress.line(
                f"the configuration has changed{told}: {before} held until rollout step {resume_step or 0}"
            )

    def train_state(self, step: int, num_updates: int) -> TrainState:
        """Return the controller's part of a checkpoint after rollout step `step`: the last step, or the one before it while the
        last is not trained yet.

        Groups that were generated ahead are left out: a resumed run generates them again with newer weights.
        """
        position = self.positions[step]
        sampler, arrays = position.sampler.pack()
        return TrainState(
            step=step,
            num_updates=num_updates,
            weight_version=step,  # a resumed run syncs this version first, even if this run skipped its last sync
            loader=position.loader,
            sampler=sampler,
            sampler_arrays=arrays,
            config=dump_config(self.config),
        )

    def resume(self, state: TrainState) -> None:
        """Continue the run of the checkpoint `state`, and drop metrics of later steps.

        Raise CheckpointError, before anything is changed, if the final export could not replace what is in its folder.
        """
        if self.config.checkpoint.export_at_end:
            check_replaceable(final_export(self.config))
        prompts = {prompt.uid: prompt for prompt in self.data.train.prompts}
        moved = self.loader.load_state(state.loader)
        lost = self.sampler.load_state(state.sampler, state.sampler_arrays, prompts)
        self.length.look_ahead(state.step, self.sampler.num_left)
        self.open_run(resume_step=state.step)
        for line in filter(None, (moved, lost)):
            self.progress.line(f"warning: {line}")

    def rollout(self, step: int) -> TrainBatch | None:
        """Return the samples to train on: prompts → rollout → reward → filter (refill). None if the last epoch has left none: then
        `length.last_step` is the step before.

        With rollout.async_steps, those that were collected beside the step before; then the next step's are begun, with
        the weights that the engine holds until `finish_rollout`. With sampling.on_full keep they may go on under newer ones.
        """
        self._wait_for_rollout()
        try:
            collected, self.rollout_times = self.ahead.take(step) or self._collect(step, lag=0)
            if not collected.groups:
                self.length.end_before(step, collected)
        except NothingVaries as error:
            self._record_untrained(step, error.collected)
            self._tell_none_right(step, error.collected.generated)
            message = f"{error}; the step's samples are in {self.config.run_dir / 'samples'}"
            raise NothingVaries(message, error.collected) from None
        except BaseException:
            if self.sampler.rescued is not None:
                self.positions[step - 1] = Position(*self.sampler.rescued)
            raise
        if not collected.groups:
            self.positions = {step - 1: self._position()}
            return None
        if self.report is None:
            self._tell_none_right(step, collected.generated)
        self.positions = {step - 1: self._untrained(step, collected), step: self._position()}
        self.length.look_ahead(step, self.sampler.num_left, collected)
        if self.config.rollout.async_steps and self.length.goes_on_after(step):
            self.ahead.begin(step + 1)
        self.report = StepReport.of(collected, collected.groups, self.config)
        self.uids = [group.prompt.uid for group in collected.groups]
        self.sources = Sources.of(collected.groups) if self.config.observe.record else None
        reward = self.config.reward
        batch = to_train_batch(collected.groups, overlong_filter=reward.overlong.filter, filter_void=reward.filter_void)
        self.work = StepWork(
            num_tokens=len(batch.tokens),
            num_generated=collected.stats.get("sampling/generated_tokens", 0),
            train_flops=self._train_flops(step, batch),
        )
        return batch

    def _train_flops(self, step: int, batch: TrainBatch) -> float:
        """Return the FLOPs of the step's gradient steps: the policy's after critic.warmup_steps, and the critic's if there is one."""
        config, trained = self.config, 0.0
        if step > config.critic.warmup_steps:
            trained += self.flops.count(batch.lengths, int(batch.loss_mask.sum()))
        if config.algo.advantage == "gae":
            trained += self.flops.count(batch.lengths, 0)  # its head is one product with a vector per token
        return 3 * config.batch.epochs * trained

    def finish_rollout(self) -> None:
        """Wait until weights may be updated: when nothing is generated any more, or at once with sampling.on_full keep.

        A rollout that failed during training raises in `rollout`, once this step is trained, recorded and saved. If the
        servers have lost the weights, the rollout goes on with the next ones, so do not wait for it.
        """
        if self.config.sampling.on_full != "keep":
            self._wait_for_rollout(unless=lambda: self.engine.weights_lost)

    def evaluate(self, step: int) -> dict[str, float]:
        """Return the `val/…` metrics of the engine's current weights. Show them, and keep them for the final report.

        Servers may still work on groups of the next step.
        """
        if not self.eval_sets:
            return {}
        self._wait_for_rollout()
        with self.timer.phase("eval"):
            self.last_eval = evaluate(
                self.answerer,
                self.eval_sets,
                self.reward,
                self.decode,
                self.config.eval,
                self.config.rollout.max_response_tokens,
                self.rollout_progress,
                tools=bool(self.config.tools),
                rewards=self.set_rewards,
            )
        folder, count, answers = self.config.run_dir, self.config.observe.eval_samples_per_set, self.last_eval.groups
        attempt("write answers", lambda: write_answers(folder, step, answers, count), self.progress.line)
        self.progress.eval_done(step, self.last_eval.metrics)
        return self.last_eval.metrics

    def make_up_evaluation(self, step: int) -> None:
        """Evaluate after step `step` if its row has no evaluation, because a signal ended the run before."""
        assert self.sinks is not None
        rows = [row for row in read_metrics(self.config.run_dir) if row["step"] == step]
        if self.eval_sets and rows and not any(name.startswith("val/") for name in rows[-1]):
            self.sinks.amend(step, self.evaluate(step))

    def record_start(self) -> None:
        """Evaluate the policy before the first rollout step. Write the result as step 0 of the metrics, with the start's time."""
        metrics = self.evaluate(step=0)
        if metrics:
            assert self.sinks is not None
            times = self.timer.pop()
            del times["time/step_s"]
            self.sinks.write(0, metrics | times)

    def pass_rate(self, prompts: Sequence[Prompt], seed: int) -> float:
        """Return the mean correctness of one sample per prompt, sampled as in training."""
        rollout = self.config.rollout
        params = SamplingParams(rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_response_tokens, seed)
        samples = Responder(self.answerer, self.reward, self.decode).samples(prompts, params)
        return sum(sample.score.acc for sample in samples) / len(samples)

    def record(self, step: int, num_updates: int, metrics: dict[str, float]) -> None:
        """Write and show the metrics and samples of one rollout step."""
        assert self.report is not None and self.sinks is not None
        self.num_failures += self.report.num_failures
        if self.report.num_failures:
            self.progress.line(self.report.failures)
        times = self.timer.pop() | self.rollout_times
        row = {
            "updates": float(num_updates),
            **self.report.metrics,
            **self.answerer.metrics(),
            **metrics,
            **throughput_metrics(self.work, times, self.num_ranks, peak_tflops(card_name())),
            **times,
            "memory/rss_gib": psutil.Process().memory_info().rss / GIB,
        }
        self.sinks.write(step, row)
        self.report.write_samples(self.config.run_dir, step, self.progress.line)
        self.progress.step_done(step, row)

    def _record_untrained(self, step: int, collected: Collected) -> None:
        """Write what was generated in a step that ends the run, so that people can see why it ended."""
        assert self.sinks is not None
        report = StepReport.of(collected, collected.generated, self.config)
        self.sinks.write(step, report.metrics)
        report.write_samples(self.config.run_dir, step, self.progress.line)

    def finish(self, export: Path | None) -> None:
        """Close the run: draw the plot, and print a report with sample answers."""
        run_dir = self.config.run_dir
        self.close()
        rows = {"metrics": str(run_dir / "metrics.jsonl"), "samples": str(run_dir / "samples")}
        if self.config.observe.plot_at_end and attempt("draw the plot", lambda: _plot(run_dir), self.progress.line):
            rows["plot"] = str(run_dir / "plot.png")
        if export is not None:
            rows["HF model"] = str(export)
        rows["wall time"] = f"{time.time() - psutil.Process().create_time():.0f} s"
        if self.num_failures:
            rows["without a score"] = f"{self.num_failures} samples; see failure in samples/"
        if self.last_eval is not None:
            rows.update(few_answers(self.last_eval.groups))
        self.progress.summary(f"{self.config.name} is done", rows)

    def _wait_for_rollout(self, unless: Callable[[], bool] = lambda: False) -> None:
        """Wait until no rollout is running ahead, or `unless()` is True."""
        if self.ahead.running:
            self.progress.phase("wait")
        with self.timer.phase("wait") if self.config.rollout.async_steps else nullcontext():
            self.ahead.wait(unless)

    def _collect(self, step: int, lag: int) -> tuple[Collected, dict[str, float]]:
        """Return the groups of a step, and the times of the phases that ran beside training."""
        collected = self.sampler.collect(step, lag)
        if self.rollout_timer is self.timer:
            return collected, {}
        times = self.rollout_timer.pop()
        del times["time/step_s"]
        return collected, times

    def _untrained(self, step: int, collected: Collected) -> Position:
        """Return where a run goes on that ends before it has trained on the groups of `step`."""
        if not self.config.checkpoint.keep_rollouts:
            return self.positions[step - 1]
        now = self._position()
        return Position(now.loader, SamplerState([*collected.groups, *now.sampler.carried], now.sampler.again))

    def _position(self) -> Position:
        return Position(self.loader.state(), self.sampler.snapshot())

    def _tell_none_right(self, step: int, groups: Sequence[Group]) -> None:
        """Report the usual causes if not one response of the step is right."""
        if why := why_none_right(groups, step, self.config, self.data.train.num_truncated):
            self.progress.line(why)

    def close(self) -> None:
        """Stop workers and servers, and close the run's files. May be called twice."""
        self.answerer.close()  # and the engine
        self.agent.close()
        for reward in (self.reward, *self.set_rewards.values()):
            reward.close()
        if self.sinks is not None:
            self.sinks.close()


def _plot(run_dir: Path) -> None:
    from dapo_mcore.observe.plots import plot_run  # matplotlib: a second that no other rank needs

    plot_run(run_dir)
