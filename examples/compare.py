"""Train variants of the quickstart with several seeds, one run after the other, and compare them in tables and one plot.

    python examples/compare.py algorithms
    python examples/compare.py clip-higher dynamic-sampling token-mean overlong --plot ablation.png

Needs the data of examples/arithmetic.py. The runs of one seed start from one policy, that of the quickstart's warm start, which
is made once, for three seeds. Started again, the same command goes on where it stopped. Runs and their logs are in --out.
Change here: the studies (STUDIES), the rows of a table (QUANTITIES), the panels of the plot (draw).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dapo_mcore.config.file import load_config
from dapo_mcore.errors import ConfigError, DapoError, DataError, TrainingError
from dapo_mcore.observe.plots import PALETTE, STYLE
from dapo_mcore.observe.progress import format_count, format_seconds
from dapo_mcore.observe.sinks import METRICS_FILE, read_metrics

CONFIG = Path(__file__).parent / "quickstart.yaml"
ACCURACY = "val/heldout/mean@8"
GOAL = 0.9
NUM_STARTS = 3
CPU_FILE = "cpu_seconds.txt"
"""In a run's folder: the CPU seconds of each start of its process."""
FORKS = multiprocessing.get_context("forkserver")
"""Starts a process for each run, as a fork of one that has imported torch and Megatron."""
FORKS.set_forkserver_preload(["__main__", "dapo_mcore.process.environment", "dapo_mcore.train.job"])
ONE_PROCESS = ("parallel.tensor_parallel=1", "rollout.num_threads=1")
QUIET = ("observe.tensorboard=false", "observe.plot_at_end=false", "observe.samples_per_step=0")
NO_CHANGE = (
    # the run needs one rollout step; its learning rate is too small to move an fp32 weight
    "num_rollout_steps=1",
    "optimizer.lr=1e-30",
    "sampling.style=none",
    "sampling.train_batch_prompts=1",
    "batch.mini_batch_prompts=1",
    "eval.at_start=false",
)
SMALL = (
    # half of the quickstart's batch, in as many gradient steps
    "checkpoint.every=1000",
    "eval.every=5",
    "sampling.train_batch_prompts=16",
    "sampling.gen_batch_prompts=20",
    "batch.mini_batch_prompts=4",
)
TINY = (*SMALL, "rollout.group_size=8", "num_rollout_steps=20")


@dataclass(frozen=True, slots=True)
class Study:
    """Variants of one setting. The first one is what the others are compared with.

    common  overrides of every variant.
    shows   a metric that the idea should move, and its name in table and plot.
    """

    title: str
    common: tuple[str, ...]
    variants: Mapping[str, tuple[str, ...]]
    seeds: Sequence[int]
    shows: tuple[str, str]


STUDIES = {
    "algorithms": Study(
        "The quickstart's task",
        (*SMALL, "num_rollout_steps=80"),
        {
            "DAPO": (),
            "GRPO": (
                "algo.loss_mode=seq-mean-token-mean",
                "algo.clip_high=0.2",
                "algo.kl.coef=0.001",
                "sampling.style=none",
                "reward.overlong.penalty=false",
            ),
            "PPO": (
                "algo.advantage=gae",
                "algo.clip_high=0.2",
                "critic.optimizer.lr=1e-3",
                "sampling.style=none",
                "reward.overlong.penalty=false",
            ),
        },
        range(3),
        ("response_length/mean", "response length"),
    ),
    "clip-higher": Study(
        "Far off-policy: 4 epochs, learning rate 1e-3",
        (*TINY, "num_rollout_steps=15", "batch.epochs=4", "optimizer.lr=1e-3"),
        {"clip at 0.28": (), "clip at 0.2": ("algo.clip_high=0.2",)},
        range(5),
        ("actor/entropy", "entropy"),
    ),
    "clip-higher-mild": Study(
        "4 epochs, the quickstart's learning rate",
        (*TINY, "batch.epochs=4"),
        {"clip at 0.28": (), "clip at 0.2": ("algo.clip_high=0.2",)},
        range(5),
        ("actor/entropy", "entropy"),
    ),
    "dynamic-sampling": Study(
        "Three of four prompts are too easy or hopeless",
        (
            *TINY,
            "data.files=runs/arithmetic/mixed.jsonl",
            "data.max_prompt_tokens=26",
            "sampling.gen_batch_prompts=40",
        ),
        {"filter": (), "no filter": ("sampling.style=none",)},
        range(5),
        ("actor/grad_norm", "gradient norm"),
    ),
    "token-mean": Study(
        "Lengths from 4 to 60 tokens, no length penalty",
        (*TINY, "rollout.max_response_tokens=64", "reward.overlong.penalty=false"),
        {"mean over tokens": (), "mean over responses": ("algo.loss_mode=seq-mean-token-mean",)},
        range(5),
        ("response_length/mean", "response length"),
    ),
    "overlong": Study(
        "At most 32 tokens: every rambling answer is cut",
        (*TINY, "rollout.max_response_tokens=32", "reward.overlong.cache=8"),
        {
            "penalty": (),
            "neither": ("reward.overlong.penalty=false",),
            "filter": ("reward.overlong.penalty=false", "reward.overlong.filter=true"),
        },
        range(5),
        ("response_length/clip_ratio", "cut responses"),
    ),
}


@dataclass(frozen=True, slots=True)
class Run:
    """One training run: a variant of a study with one seed. `makes_start`: the warm start that a seed's runs share."""

    name: str
    out: Path
    overrides: tuple[str, ...]
    num_steps: int
    makes_start: bool = False

    @property
    def folder(self) -> Path:
        return self.out / self.name

    @property
    def policy(self) -> Path:
        """The folder of the policy that the run exports at its end."""
        return self.folder / "hf" / "final"

    @property
    def words(self) -> tuple[str, ...]:
        """All overrides of the run."""
        return (*ONE_PROCESS, *QUIET, *self.overrides, f"output_dir={self.out}", f"name={self.name}")

    def is_finished(self) -> bool:
        """Return True if the run is complete. Raise ConfigError if its folder holds a run of other settings."""
        config = load_config(CONFIG, self.words)
        recorded = self.folder / "config.yaml"
        if not recorded.is_file():
            return False
        if load_config(recorded) != config:
            raise ConfigError(f"{self.folder} has a run of other settings; delete the folder, or choose another --out")
        if self.makes_start:
            return self.policy.is_dir()
        return bool(rows := read_metrics(self.folder)) and rows[-1]["step"] == self.num_steps and ACCURACY in rows[-1]


class Result(NamedTuple):
    """What a finished run has reached. Steps and samples to the goal are NaN if it was not reached."""

    accuracy: np.ndarray  # [E, 3]: rollout step, samples generated until then, accuracy
    shown: np.ndarray  # [N, 2]: rollout step, the study's metric
    wall_s: float
    cpu_s: float

    @property
    def best(self) -> float:
        return float(self.accuracy[:, 2].max())

    @property
    def last(self) -> float:
        return float(self.accuracy[-1, 2])

    @property
    def samples(self) -> float:
        return float(self.accuracy[-1, 1])

    def to_goal(self, column: int) -> float:
        """Return the rollout steps (column 0) or samples (column 1) until the accuracy was first at least GOAL."""
        reached = self.accuracy[self.accuracy[:, 2] >= GOAL]
        return float(reached[0, column]) if len(reached) else float("nan")

    @property
    def shown_at_end(self) -> float:
        """Return the mean of the study's metric over the last five steps."""
        return float(np.nanmean(self.shown[-5:, 1]))


Results = dict[str, list[Result]]
"""Of each variant of a study, the results in the order of its seeds."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="+", choices=STUDIES, metavar="STUDY", help=", ".join(STUDIES))
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder of the runs (%(default)s)")
    parser.add_argument("--plot", type=Path, help="the PNG; default: STUDIES.png in --out")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="a.b=c", help="overrides for all runs, such as fewer steps"
    )
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        compare(options.studies, options.out, options.plot, tuple(options.set), Console(highlight=False))
    except DapoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


def compare(names: Sequence[str], out: Path, plot: Path | None, more: tuple[str, ...], console: Console) -> None:
    """Run what is missing of the studies, print their tables and write their plot."""
    plans = {name: plan(name, out, more) for name in names}
    runs = [run for name in names for run in (*starts(STUDIES[name].seeds, out), *plans[name].values())]
    runs = [run for run in dict.fromkeys(runs) if not run.is_finished()]
    with Progress(
        TextColumn("{task.description:<40}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        every = progress.add_task("runs", total=len(runs))
        for number, run in enumerate(runs, 1):
            train(run, progress)
            progress.advance(every)
            progress.console.print(f"run {number} of {len(runs)}: {run.name} is done, {_told(run)}")
    results = {name: _results(STUDIES[name], plans[name]) for name in names}
    for name, found in results.items():
        console.print(table(name, found))
    console.print(f"plot: {draw(results, plot or out / ('_'.join(names) + '.png'))}")


def starts(seeds: Iterable[int], out: Path) -> list[Run]:
    """Return the run of each seed that makes its starting policy. Seeds 3 and 4 begin with those of 0 and 1."""
    made = [seed % NUM_STARTS for seed in seeds]
    return [Run(f"start-{seed}", out, (*NO_CHANGE, f"seed={seed}"), 1, makes_start=True) for seed in made]


def plan(name: str, out: Path, more: tuple[str, ...]) -> dict[tuple[str, int], Run]:
    """Return the runs of a study by variant and seed."""
    study, runs = STUDIES[name], {}
    for seed, start in zip(study.seeds, starts(study.seeds, out)):
        begin = ("warm_start=null", "model.init=pretrained", f"model.path={start.policy}")
        for variant, overrides in study.variants.items():
            words = (*begin, f"seed={seed}", "checkpoint.export_at_end=false", *study.common, *overrides, *more)
            steps = load_config(CONFIG, words).num_rollout_steps
            runs[variant, seed] = Run(f"{name}-{variant.replace(' ', '_')}-{seed}", out, words, steps)
    return runs


def train(run: Run, progress: Progress) -> None:
    """Train to the end of the run. Raise TrainingError with the last line of its log if it fails."""
    run.out.mkdir(parents=True, exist_ok=True)
    log = run.out / f"{run.name}.log"
    task = progress.add_task(run.name, total=run.num_steps)
    process = FORKS.Process(target=train_here, args=(run, log), name=run.name)
    process.start()
    try:
        while process.is_alive():
            process.join(1)
            progress.update(task, **_position(run))
    finally:
        process.terminate()  # nothing, if it has ended
        process.join()
        progress.remove_task(task)
    if process.exitcode:
        raise TrainingError(f"{run.name} ended with status {process.exitcode}: {_last_line(log)}; its log is {log}")


def train_here(run: Run, log: Path) -> None:
    """Be the process of a run: write all output to its log, and in the end the CPU seconds."""
    from dapo_mcore.train.__main__ import main as train_main

    with log.open("ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    status = train_main([str(CONFIG), *run.words])
    if run.folder.is_dir():
        usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        with (run.folder / CPU_FILE).open("a", encoding="utf-8") as seconds:
            seconds.write(f"{sum(usage.ru_utime + usage.ru_stime for usage in usages):.1f}\n")
    sys.exit(status)


def _position(run: Run) -> dict[str, object]:
    """Return the progress of a run in its metrics, as keywords of Progress.update."""
    rows = read_metrics(run.folder) if (run.folder / METRICS_FILE).is_file() else []
    accuracies = [row[ACCURACY] for row in rows if ACCURACY in row]
    told = f"{run.name}: {accuracies[-1]:.3f}" if accuracies else run.name
    return {"completed": rows[-1]["step"] if rows else 0, "description": told}


def _told(run: Run) -> str:
    seconds = f"{format_seconds(_spent(run))} of CPU"
    return seconds if run.makes_start else f"{read_metrics(run.folder)[-1][ACCURACY]:.3f} right, {seconds}"


def _spent(run: Run) -> float:
    return sum(map(float, (run.folder / CPU_FILE).read_text(encoding="utf-8").split()))


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it printed nothing"


def _results(study: Study, runs: Mapping[tuple[str, int], Run]) -> Results:
    return {
        variant: [read_result(runs[variant, seed], study.shows[0]) for seed in study.seeds]
        for variant in study.variants
    }


def read_result(run: Run, shown: str) -> Result:
    """Return the result of a run from its metrics."""
    rows, samples, accuracy = read_metrics(run.folder), 0.0, []
    for row in rows:
        samples += row.get("sampling/samples_generated", 0.0)
        if ACCURACY in row:
            accuracy.append((row["step"], samples, row[ACCURACY]))
    points = [(row["step"], row[shown]) for row in rows if shown in row]
    if not accuracy or not points:
        raise DataError(f"{run.folder}: no step has {ACCURACY} and {shown}; delete the folder and start again")
    wall_s = sum(row.get("time/step_s", 0.0) for row in rows)
    return Result(np.array(accuracy), np.array(points), wall_s, _spent(run))


class Quantity(NamedTuple):
    """A row of a table: `value` of one result, written by `write`. NaN counts as not reached."""

    heading: str
    value: Callable[[Result], float]
    write: Callable[[float], str]


QUANTITIES = (
    Quantity("best accuracy", lambda r: r.best, "{:.3f}".format),
    Quantity("last accuracy", lambda r: r.last, "{:.3f}".format),
    Quantity(f"steps to {GOAL}", lambda r: r.to_goal(0), "{:.0f}".format),
    Quantity(f"samples to {GOAL}", lambda r: r.to_goal(1), format_count),
    Quantity("samples", lambda r: r.samples, format_count),
    Quantity("step time", lambda r: r.wall_s, format_seconds),
    Quantity("CPU time", lambda r: r.cpu_s, format_seconds),
)
DIFFERENCE = "{:+.3f}".format


def table(name: str, results: Results) -> Table:
    """Return a study's table, a column for each variant: of each number the mean over seeds and min..max.

    The difference of the last accuracy from that of the first variant is taken seed by seed.
    """
    study, (first, *_) = STUDIES[name], results.values()
    found = Table(title=f"{name}: {study.title}", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for heading in (f"{len(study.seeds)} seeds", *results):
        found.add_column(heading)
    for quantity in QUANTITIES:
        found.add_row(
            quantity.heading, *(spread(map(quantity.value, runs), quantity.write) for runs in results.values())
        )
    shown = (spread([run.shown_at_end for run in runs], "{:.3g}".format) for runs in results.values())
    found.add_row(f"{study.shows[1]} at the end", *shown)
    gains = ([run.last - base.last for run, base in zip(runs, first)] for runs in results.values())
    found.add_row("against the first", *("" if not any(gain) else spread(gain, DIFFERENCE) for gain in gains))
    return found


def spread(values: Iterable[float], write: Callable[[float], str]) -> str:
    """Return the mean and min..max of the values that are not NaN, and how many these are if some are.

    Example: `50 (40..60), 2 of 3`, and `0 of 3` if all are NaN.
    """
    values = list(values)
    known = [value for value in values if value == value]
    share = f"{len(known)} of {len(values)}"
    if not known:
        return share
    told = f"{write(sum(known) / len(known))} ({write(min(known))}..{write(max(known))})"
    return told if len(known) == len(values) else f"{told}, {share}"


def draw(results: Mapping[str, Results], out: Path) -> Path:
    """Write the plot and return its path: a row for each study, with accuracy by step, by samples, and the study's metric."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 0.6 + 3.1 * len(results)), layout="constrained")
        rows = figure.subplots(len(results), 3, squeeze=False)
        for axes, (name, variants) in zip(rows, results.items()):
            study = STUDIES[name]
            axes[0].set_title(f"{name}: {study.title}")
            for panel, column in ((axes[0], 0), (axes[1], 1)):
                _bands(panel, variants, lambda run, column=column: run.accuracy[:, [column, 2]])
                panel.set_ylabel("held-out accuracy")
            _bands(axes[2], variants, lambda run: run.shown)
            axes[2].set_ylabel(study.shows[1])
            for panel, label in zip(axes, ("rollout step", "samples generated", "rollout step")):
                panel.set_xlabel(label)
            axes[1].xaxis.set_major_locator(MaxNLocator(nbins=6))
            axes[1].xaxis.set_major_formatter(FuncFormatter(lambda count, _: format_count(count)))
            axes[0].legend(loc="best")
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=80, format="png")
    return out


def _bands(axes: Axes, variants: Results, curve: Callable[[Result], np.ndarray]) -> None:
    """Draw each variant's mean over seeds, in a band from the lowest to the highest seed. A curve is [N, 2]: x and y.

    Seeds may have different x (samples generated); the mean is taken over both.
    """
    for colour, (name, runs) in zip(PALETTE, variants.items()):
        curves = np.array([curve(run) for run in runs])  # [S, N, 2]
        x, y = curves.mean(0).T
        axes.plot(x, y, color=colour, linewidth=1.8, label=name)
        axes.fill_between(x, curves[..., 1].min(0), curves[..., 1].max(0), color=colour, alpha=0.15, linewidth=0)


if __name__ == "__main__":
    sys.exit(main())
