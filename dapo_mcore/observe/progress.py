"""The live view of a run: a rich display on a terminal, one line per step everywhere else.

Change here: what a step's line and the table of the last steps show, and how durations and counts are written.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as PhaseBar
from rich.table import Table
from rich.text import Text

from dapo_mcore.observe.sinks import valid_text

TABLE_STEPS = 8
ETA_STEPS = 20

Metrics = Mapping[str, float]


class NullProgress:
    """The interface of Progress, without any output: for all ranks but 0."""

    def __enter__(self) -> NullProgress:
        return self

    def __exit__(self, *_: object) -> None: ...

    def phase(self, name: str, total: int | None = None) -> None: ...

    def advance(self, n: int = 1) -> None: ...

    def more(self, n: int) -> None: ...

    def clear(self) -> None: ...

    def expect(self, num_steps: int, is_exact: bool) -> None: ...

    def beside(self) -> NullProgress:
        return self

    def step_done(self, step: int, metrics: Metrics) -> None: ...

    def eval_done(self, step: int, metrics: Metrics) -> None: ...

    def line(self, text: str) -> None: ...

    def summary(self, title: str, rows: Mapping[str, str]) -> None: ...


class PhaseLine(NullProgress):
    """A bar for one phase at a time. Other threads may advance it."""

    def __init__(self, bar: PhaseBar, on_advance: Callable[[], None]) -> None:
        self._bar, self._on_advance, self._lock = bar, on_advance, threading.Lock()
        self._task: TaskID | None = None
        self._total: int | None = None

    def phase(self, name: str, total: int | None = None) -> None:
        """Begin a phase, with a bar of `total` items (samples, micro-batches, …) if their number is known."""
        self.clear()
        with self._lock:
            self._task, self._total = self._bar.add_task(name, total=total), total

    def advance(self, n: int = 1) -> None:
        """Add `n` to the finished items of the current phase."""
        self._on_advance()
        with self._lock:
            if self._task is not None:
                self._bar.advance(self._task, n)

    def more(self, n: int) -> None:
        """Add `n` to the total of the current phase, which was begun with a total."""
        with self._lock:
            if self._task is not None and self._total is not None:
                self._total += n
                self._bar.update(self._task, total=self._total)

    def clear(self) -> None:
        """End the phase."""
        with self._lock:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = None


class Progress(NullProgress):
    """The run's progress on rank 0's standard output, a context manager around the whole run.

    A terminal gets the live display; a pipe or a file gets plain lines, flushed one by one. `on_advance` is called, in any thread,
    whenever an item is finished.
    """

    def __init__(
        self,
        name: str,
        num_steps: int | None,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_advance: Callable[[], None] = lambda: None,
    ) -> None:
        self._name, self._num_steps, self._clock, self._on_advance = name, num_steps, clock, on_advance
        self._console = console or Console(highlight=False)
        self._start = self._step_start = clock()
        self._durations: deque[float] = deque(maxlen=ETA_STEPS)
        self._history: deque[tuple[int, Metrics]] = deque(maxlen=TABLE_STEPS)
        self._step, self._updates, self._last_val = 0, 0, {}
        self._limit = ""
        self._bar = PhaseBar(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=40),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._line = PhaseLine(self._bar, on_advance)
        self._live = (
            Live(self, console=self._console, refresh_per_second=4, vertical_overflow="crop")
            if self._console.is_terminal
            else None
        )

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
        if self._live:
            self._live.stop()

    def phase(self, name: str, total: int | None = None) -> None:
        """Begin a phase, as PhaseLine does."""
        self._line.phase(name, total)

    def advance(self, n: int = 1) -> None:
        self._line.advance(n)

    def more(self, n: int) -> None:
        self._line.more(n)

    def clear(self) -> None:
        self._line.clear()

    def expect(self, num_steps: int, is_exact: bool) -> None:
        """Learn the run's number of rollout steps, or an upper bound of it."""
        self._num_steps, self._limit = num_steps, "" if is_exact else "≤"

    def beside(self) -> NullProgress:
        """Return a second bar, for the phases of another thread."""
        return PhaseLine(self._bar, self._on_advance)

    def step_done(self, step: int, metrics: Metrics) -> None:
        """Show the finished rollout step `step`. It took `time/step_s`, or the time since the previous step."""
        now = self._clock()
        between = sum(metrics.get(f"time/{phase}_s", 0.0) for phase in ("eval", "save"))
        self._durations.append(metrics["time/step_s"] + between if "time/step_s" in metrics else now - self._step_start)
        self._step, self._step_start = step, now
        self._updates = int(metrics.get("updates", self._updates))
        self._last_val = _val_means(metrics) or self._last_val
        self._history.append((step, {**metrics, **self._last_val}))
        self.clear()
        if self._live is None:
            self.line(step_line(step, self._num_steps, metrics, self._eta(), self._limit))

    def eval_done(self, step: int, metrics: Metrics) -> None:
        """Print the evaluation after rollout step `step` (0: before training), one line in both views."""
        self._last_val = _val_means(metrics) or self._last_val
        self.line(eval_line(step, metrics))

    def line(self, text: str) -> None:
        """Print one line of text, on a terminal above the live display."""
        self._console.print(Text(valid_text(text)), soft_wrap=True)

    def summary(self, title: str, rows: Mapping[str, str]) -> None:
        """End the live display and print a closing block of `label  value` lines, such as where checkpoints and plots are."""
        self.clear()
        if self._live:
            self._live.stop()
        width = max(map(len, rows), default=0)
        self.line("\n".join([title, *(f"  {label:<{width}}  {value}" for label, value in rows.items())]))

    def _eta(self) -> float:
        """Return the estimated seconds left, from recent steps with evaluation and saving; NaN before the first step."""
        if not self._durations or self._num_steps is None:
            return math.nan
        return (self._num_steps - self._step) * sum(self._durations) / len(self._durations)

    def __rich__(self) -> Group:
        """Return the live display as rich prints it: the header, the bars of running phases and the last steps."""
        header = Text.assemble(
            (self._name, "bold"),
            f"  rollout step {self._step}/{self._limit}{self._num_steps or '?'}  gradient step {self._updates}",
            f"  elapsed {format_seconds(self._clock() - self._start)}  ETA {self._limit}{format_seconds(self._eta())}",
        )
        shown = [header, self._bar] if self._bar.tasks else [header]
        if self._history:
            shown.append(step_table(list(self._history), self._console.width))
        return Group(*shown)


class Column(NamedTuple):
    """One number of a step: its heading, its format, and its rank; on a narrow terminal high ranks are left out."""

    heading: str
    rank: int
    write: Callable[[Metrics], str]


def step_line(step: int, num_steps: int | None, metrics: Metrics, eta_s: float, limit: str = "") -> str:
    """Return `step 12/50 | update 48 | reward 0.41 | … | gen 1.2s train 0.9s | ETA 1m40s`; missing numbers are left out."""
    parts = [f"step {step}/{limit}{num_steps or '?'}"]
    parts += [f"{c.heading} {text}".strip() for c in _LINE if (text := c.write(metrics))]
    times = [f"{c.heading} {text}" for c in _TIMES if (text := c.write(metrics))]
    parts += [" ".join(times)] if times else []
    return " | ".join([*parts, f"ETA {limit}{format_seconds(eta_s)}"])


def eval_line(step: int, metrics: Metrics) -> str:
    """Return `eval after step 12 | aime mean@32 0.312 best@32 0.600 response_length 912`; failures only when there are some."""
    sets: dict[str, list[str]] = {}
    for name, value in metrics.items():
        _, dataset, quantity = name.split("/", 2) if name.startswith("val/") else ("", "", "")
        if dataset and (quantity, value) != ("failures", 0):
            whole = quantity in ("response_length", "policy_length", "failures")
            sets.setdefault(dataset, []).append(f"{quantity} {_fixed(value, 0 if whole else 3)}")
    return " | ".join([f"eval after step {step}", *(f"{name} {' '.join(items)}" for name, items in sets.items())])


def step_table(history: list[tuple[int, Metrics]], width: int) -> Table:
    """Return the last steps as a table of at most `width` characters, without the least important columns if needed."""
    columns = [c for c in (*_LINE, *_VAL, *_TIMES) if any(c.write(metrics) for _, metrics in history)]
    while len(columns) > 1 and sum(_cell_width(c, history) for c in columns) + len("step") > width:
        columns.remove(max(columns, key=lambda c: c.rank))
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("step", justify="right", no_wrap=True)
    for column in columns:
        table.add_column(column.heading or "tok/s", justify="right", no_wrap=True)
    for step, metrics in history:
        table.add_row(str(step), *(column.write(metrics).removesuffix(" tok/s") for column in columns))
    return table


def _cell_width(column: Column, history: list[tuple[int, Metrics]]) -> int:
    """Return the characters of the widest cell, plus the gap of two before it."""
    return 2 + max(len(column.heading), *(len(column.write(metrics)) for _, metrics in history))


def format_seconds(seconds: float) -> str:
    """Return `8s`, `1m40s`, `3h05m` or `2d04h`; `-` for NaN."""
    if not math.isfinite(seconds):
        return "-"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02d}h"
    if hours:
        return f"{h}h{m:02d}m"
    return f"{m}m{s:02d}s" if m else f"{s}s"


def format_count(value: float) -> str:
    """Return `870`, `5.1k` or `2.3M`."""
    for limit, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * limit:
            return f"{value / limit:.1f}{suffix}"
    return f"{value:.0f}"


def _fixed(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def _number(name: str, digits: int, suffix: str = "") -> Callable[[Metrics], str]:
    return lambda metrics: _fixed(metrics[name], digits) + suffix if name in metrics else ""


def _kept(metrics: Metrics) -> str:
    names = ("sampling/groups_kept", "sampling/groups_generated")
    return "/".join(f"{metrics[name]:.0f}" for name in names) if all(name in metrics for name in names) else ""


def _failures(metrics: Metrics) -> str:
    """Return the number of samples whose scoring failed, empty for 0."""
    failures = metrics.get("reward/failures", 0)
    return f"{failures:.0f}" if failures else ""


def _skipped(metrics: Metrics) -> str:
    """Return the number of gradient steps that were skipped, empty for 0."""
    skipped = metrics.get("actor/skipped_updates", 0) + metrics.get("actor/skipped_spikes", 0)
    return f"{skipped:.0f}" if skipped else ""


def _tokens_per_s(metrics: Metrics) -> str:
    return f"{format_count(metrics['perf/tokens_per_s'])} tok/s" if "perf/tokens_per_s" in metrics else ""


def _val_means(metrics: Metrics) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if k.startswith("val/") and "/mean@" in k}


def _val(metrics: Metrics) -> str:
    return next((_fixed(value, 3) for value in _val_means(metrics).values()), "")


_LINE = (
    Column("update", 20, _number("updates", 0)),
    Column("reward", 1, _number("reward/mean", 2)),
    Column("acc", 2, _number("reward/acc", 2)),
    Column("entropy", 4, _number("actor/entropy", 2)),
    Column("len", 5, _number("response_length/mean", 1)),
    Column("kept", 6, _kept),
    Column("failed", 3, _failures),
    Column("skipped", 3, _skipped),
    Column("grad", 7, _number("actor/grad_norm", 2)),
    Column("", 9, _tokens_per_s),
)
_VAL = (Column("val", 3, _val),)
_TIMES = tuple(
    Column(heading, 10 + order, _number(f"time/{phase}_s", 1, "s"))
    for order, (heading, phase) in enumerate(
        {"gen": "generate", "train": "train", "sync": "sync", "logprob": "logprob", "eval": "eval"}.items()
    )
)
