"""What a run prints: whole lines into a pipe, and a table that fits on a terminal."""

from __future__ import annotations

import inspect
import io
import re
import threading

import pytest
from rich.console import Console

from dapo_mcore.observe.progress import NullProgress, Progress, eval_line, format_count, format_seconds, step_line

METRICS = {
    "updates": 48.0,
    "reward/mean": 0.411,
    "reward/acc": 0.62,
    "actor/entropy": 0.309,
    "response_length/mean": 23.08,
    "sampling/groups_kept": 32.0,
    "sampling/groups_generated": 48.0,
    "actor/grad_norm": 0.42,
    "perf/tokens_per_s": 5093.0,
    "time/generate_s": 1.21,
    "time/train_s": 0.88,
    "time/sync_s": 0.02,
    "time/step_s": 2.5,
}
VAL = {"val/aime/mean@32": 0.3124, "val/aime/maj@32": 0.4, "val/aime/response_length": 911.6, "val/gsm8k/mean@1": 0.5}


def pipe(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width, highlight=False)


def terminal(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, height=40, force_terminal=True, highlight=False)


def printed(console: Console) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())  # type: ignore[attr-defined]


def test_a_steps_line() -> None:
    assert step_line(12, 50, METRICS, 100.0) == (
        "step 12/50 | update 48 | reward 0.41 | acc 0.62 | entropy 0.31 | len 23.1 | kept 32/48 | grad 0.42 | "
        "5.1k tok/s | gen 1.2s train 0.9s sync 0.0s | ETA 1m40s"
    )


def test_missing_numbers_are_left_out_and_nan_is_a_dash() -> None:
    assert step_line(1, 2, {"reward/mean": float("nan")}, float("nan")) == "step 1/2 | reward - | ETA -"


def test_a_steps_line_shows_failed_scores_only_when_there_are_some() -> None:
    assert "failed" not in step_line(1, 2, METRICS | {"reward/failures": 0.0}, 1.0)
    assert "| failed 12 |" in step_line(1, 2, METRICS | {"reward/failures": 12.0}, 1.0)


def test_a_steps_line_shows_skipped_gradient_steps_only_when_there_are_some() -> None:
    none = {"actor/skipped_updates": 0.0, "actor/skipped_spikes": 0.0}
    assert "skipped" not in step_line(1, 2, METRICS | none, 1.0)
    assert "| skipped 3 |" in step_line(
        1, 2, METRICS | {"actor/skipped_updates": 1.0, "actor/skipped_spikes": 2.0}, 1.0
    )


def test_an_evaluations_line() -> None:
    line = eval_line(12, {**METRICS, **VAL})
    assert line == "eval after step 12 | aime mean@32 0.312 maj@32 0.400 response_length 912 | gsm8k mean@1 0.500"


def test_an_evaluation_shows_failures_only_when_there_are_some() -> None:
    line = eval_line(0, {"val/a/clip_ratio": 0.25, "val/a/failures": 3.0, "val/b/mean@1": 1.0, "val/b/failures": 0.0})
    assert line == "eval after step 0 | a clip_ratio 0.250 failures 3 | b mean@1 1.000"


def test_a_pipe_gets_one_unbroken_line_a_step_and_nothing_for_phases() -> None:
    console = pipe(width=40)
    with Progress("run", 50, console) as progress:
        progress.phase("generate", total=4)
        progress.advance(2)
        progress.step_done(11, METRICS)
        progress.step_done(12, METRICS)
        progress.eval_done(12, VAL)
        progress.line("[not markup] :smile:")
        progress.summary("done", {"plot": "a.png", "metrics": "b"})
    lines = printed(console).splitlines()
    assert lines[0].startswith("step 11/50 | update 48")
    assert lines[0].endswith("ETA 1m38s")  # 39 steps of 2.5 s = 97.5 s, rounded to the even second
    assert lines[1].endswith("ETA 1m35s")
    assert lines[2].startswith("eval after step 12")
    assert lines[3:] == ["[not markup] :smile:", "done", "  plot     a.png", "  metrics  b"]


def test_a_line_with_half_a_surrogate_pair_reaches_the_screen() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    Progress("run", 5, Console(file=file)).line("a\ud83d b")
    file.flush()
    assert file.buffer.getvalue().decode() == "a\ufffd b\n"


def test_the_eta_uses_the_clock_when_the_step_time_is_unknown() -> None:
    now = [0.0]
    console = pipe()
    with Progress("run", 10, console, clock=lambda: now[0]) as progress:
        for step, moment in ((1, 4.0), (2, 6.0)):
            now[0] = moment
            progress.step_done(step, {})
    assert printed(console).splitlines() == ["step 1/10 | ETA 36s", "step 2/10 | ETA 24s"]


def test_the_eta_counts_evaluation_and_saving_but_not_the_start() -> None:
    console = pipe()
    with Progress("run", 3, console) as progress:
        progress.step_done(1, {"time/step_s": 4.0, "time/eval_s": 10.0, "time/save_s": 6.0, "time/start_s": 500.0})
    assert printed(console) == "step 1/3 | eval 10.0s | ETA 40s\n"


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_terminal_shows_header_bar_and_a_table_that_fits(width: int) -> None:
    console = terminal(width)
    progress = Progress("quickstart", 50, console)
    for step in range(1, 13):
        progress.step_done(step, {**METRICS, **VAL})
    progress.phase("generate", total=1280)
    progress.advance(512)
    with console.capture() as capture:
        console.print(progress)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capture.get())
    header, display = shown.split("generate", 1)
    bar, headings, *rows = display.splitlines()
    assert header.startswith("quickstart  rollout step 12/50  gradient step 48")
    assert "512/1280" in bar
    assert {"step", "reward", "acc", "val"} <= set(headings.split())
    assert [row.split()[0] for row in rows] == [str(step) for step in range(5, 13)]
    assert "…" not in shown
    assert ("train" in headings) == (width >= 80)


def test_work_beside_the_run_has_a_line_of_its_own_that_any_thread_may_move() -> None:
    console = terminal(80)
    progress = Progress("run", 2, console)
    beside = progress.beside()
    progress.phase("train", total=8)
    beside.phase("generate", total=0)
    beside.more(4000)

    def advance() -> None:
        for _ in range(1000):
            beside.advance()

    threads = [threading.Thread(target=advance) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(50):  # the run's own phases change meanwhile
        progress.phase("sync")
        progress.phase("train", total=8)
    for thread in threads:
        thread.join()
    progress.advance(3)
    with console.capture() as capture:
        console.print(progress)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capture.get())
    assert re.search(r"train .* 3/8 ", shown) and re.search(r"generate .* 4000/4000 ", shown)
    assert NullProgress().beside().more(1) is None


def test_a_terminal_prints_evaluations_above_the_display() -> None:
    console = terminal(120)
    with Progress("run", 2, console) as progress:
        progress.eval_done(0, VAL)
        progress.step_done(1, METRICS)
    assert "eval after step 0 | aime mean@32 0.312" in printed(console)
    assert "step 1/2 |" not in printed(console)


def test_the_summary_stands_below_the_last_table() -> None:
    console = terminal(120)
    with Progress("run", 1, console) as progress:
        progress.step_done(1, METRICS)
        progress.summary("run is done", {"plot": "a.png"})
    text = printed(console)
    assert text.rindex("rollout step 1/1") < text.rindex("run is done") < text.rindex("a.png")


def test_the_display_stops_when_the_run_fails() -> None:
    console = terminal(120)
    with pytest.raises(KeyError), Progress("run", 2, console):
        raise KeyError
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.rindex("\x1b[?25l") < shown.rindex("\x1b[?25h"), "the cursor must be shown again"


def test_null_progress_has_the_same_methods_and_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def public(kind: type) -> dict[str, list[str]]:
        methods = inspect.getmembers(kind, inspect.isfunction)
        return {name: list(inspect.signature(f).parameters) for name, f in methods if not name.startswith("_")}

    assert public(Progress) == public(NullProgress)
    with NullProgress() as progress:
        progress.phase("generate", 3)
        progress.advance()
        progress.clear()
        progress.step_done(1, METRICS)
        progress.eval_done(1, VAL)
        progress.line("x")
        progress.summary("x", {})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (100, "1m40s"),
        (11100, "3h05m"),
        (187200, "2d04h"),
        (float("nan"), "-"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(870, "870"), (999.6, "1.0k"), (5093, "5.1k"), (2.34e6, "2.3M")])
def test_counts(value: float, text: str) -> None:
    assert format_count(value) == text
