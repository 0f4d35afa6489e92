"""Train the quickstart's task while everything goes wrong, and check that nothing is lost.

    python -m tools.soak --minutes 30 [--seed 0] [--ranks 2] [--work runs/soak] [KEY=VALUE …]      # from the root of the repository

Runs are killed, stopped, starved and damaged in rounds until the time is over. Each round must end with the bits of one
undisturbed run. The exit status is 0 if all did, 1 if one did not, 2 if the soak cannot run. The work folder keeps the undisturbed
run for the next soak, a log for each round, the last run that was not equal, and soak.json.

Change here: the options. What happens to a run is in events.py and strikes.py, what is compared in oracle.py.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tools.soak import arena
from tools.soak.events import KINDS, max_restarts, schedule
from tools.soak.job import NAME, ROOT, TASK, Job, Setup, kill_family
from tools.soak.report import Report, summary, write
from tools.soak.rounds import Round, RoundResult

_REFERENCE_S = 1200
_MARK = ".soak"
"""A file that says that a work folder is a soak's own."""
_SERVERS = ("rollout.engine=sglang", "rollout.sglang.device=cpu", "rollout.sglang.colocated=false")


class CannotRun(Exception):
    """The soak cannot run, for a reason in one line."""


def main(arguments: list[str]) -> int:
    options = build_parser().parse_args(arguments)
    words = arena.enter("tools.soak", arguments)
    mark = secrets.token_hex(8)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts programs in the background with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    try:
        return Soak(options, words, mark).run()
    except CannotRun as error:
        print(f"error: soak: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the running round was not checked", file=sys.stderr)
        return 130
    finally:
        kill_family(mark)


class Soak:
    """All rounds of one call."""

    def __init__(self, options: argparse.Namespace, arena_words: str, mark: str):
        self._options, self._report, self._has_disk = options, Report(), arena.has_disk(arena_words)
        work = options.work.absolute()
        overrides = [f"seed={options.seed}", *(_servers(options.sglang) if options.sglang else ()), *options.overrides]
        config = ROOT / "examples/quickstart.yaml"
        self._setup = Setup(config, tuple(overrides), options.ranks, options.steps, work, mark)
        self._kinds = self._possible(options.kinds, overrides)
        self._report.line(f"small disk: {arena_words}")

    def run(self) -> int:
        setup, options, report = self._setup, self._options, self._report
        self._prepare()
        reference, reference_s = self._reference()
        deadline, rounds = time.monotonic() + 60 * options.minutes, []
        while time.monotonic() < deadline or not rounds:
            rounds.append(self._round(len(rounds), reference))
            write(
                setup.work / "soak.json",
                rounds,
                seed=options.seed,
                ranks=options.ranks,
                overrides=[*TASK, *setup.overrides],
                reference_s=reference_s,
            )
        print(summary(rounds, reference_s))
        report.line(f"written: {setup.work / 'soak.json'}")
        return int(any(result.problems for result in rounds))

    def _round(self, number: int, reference: Path) -> RoundResult:
        setup, options = self._setup, self._options
        events = schedule(
            options.seed,
            number,
            options.events,
            num_steps=setup.num_steps - 1,
            num_ranks=setup.num_ranks,
            kinds=self._kinds,
        )
        restarts = max_restarts(options.seed, number)
        self._report.line(f"round {number}, torchrun --max-restarts {restarts}: {', '.join(map(str, events))}")
        disk = setup.work / "disk"
        result = Round(setup, number, restarts, disk, self._report.outcome, self._report.show).run(
            events, reference, bitwise=not options.sglang
        )
        for problem in result.problems or ["the same bits as the undisturbed run, and nothing left over"]:
            self._report.line(f"round {number}: {problem}")
        if result.problems:
            kept = setup.work / f"round-{number:03d}"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(disk / NAME, kept, symlinks=True)
        return result

    def _prepare(self) -> None:
        """Make the data and the model, an empty place for temporary files, and the small disk. Never in a folder of others."""
        setup = self._setup
        claim(setup.work)
        for folder in ("tmp", "disk", "torchrun"):
            shutil.rmtree(setup.work / folder, ignore_errors=True)
            (setup.work / folder).mkdir(parents=True)
        if self._has_disk:
            arena.mount(setup.work / "disk")
        if not (setup.work / "runs/arithmetic/demonstrations.jsonl").exists():
            command = [sys.executable, str(ROOT / "examples/arithmetic.py"), "--out", "runs/arithmetic"]
            subprocess.run(command, cwd=setup.work, env=setup.environment(), check=True, stdout=subprocess.DEVNULL)

    def _reference(self) -> tuple[Path, float]:
        """Return the folder of the undisturbed run, and the seconds that it took; from an earlier soak if nothing has changed."""
        setup, key = self._setup, hashlib.sha256()
        for path in [
            setup.config,
            *sorted((ROOT / "dapo_mcore").rglob("*.py")),
            *sorted((ROOT / "kernels").rglob("*.py")),
        ]:
            key.update(path.read_bytes())
        key.update(repr((TASK, setup.overrides, setup.num_ranks, setup.num_steps)).encode())
        folder = setup.work / "references" / key.hexdigest()[:16]
        took = folder / "seconds"
        if not took.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            took.write_text(f"{self._run_undisturbed(folder)}")
        seconds = float(took.read_text())
        self._report.line(f"undisturbed run: {setup.num_steps} steps in {seconds:.0f} s, in {folder / NAME}")
        return folder / NAME, seconds

    def _run_undisturbed(self, folder: Path) -> float:
        begin = time.monotonic()
        job = Job(self._setup, folder, folder / "log")
        while job.status is None and time.monotonic() - begin < _REFERENCE_S:
            self._report.show(f"undisturbed run: step {job.last_step()}/{self._setup.num_steps}")
            time.sleep(0.1)
        if not job.is_finished():
            job.process.terminate()
            raise CannotRun(f"the undisturbed run did not end well, see {folder / 'log'}: {job.words()}")
        return time.monotonic() - begin

    def _possible(self, wanted: str | None, overrides: list[str]) -> list[str]:
        """Return the kinds of events, and say which are left out."""
        kinds = wanted.split(",") if wanted else list(KINDS)
        if unknown := sorted(set(kinds) - set(KINDS)):
            raise CannotRun(f"event {unknown[0]} is unknown; use {', '.join(KINDS)}")
        has_savers = "checkpoint.async_save=false" not in overrides
        reasons = {
            "kill-server": "" if self._options.sglang else "the engine is embedded; --sglang starts servers",
            "disk-full": "" if self._has_disk else "there is no small disk",
            **dict.fromkeys(("kill-saver", "freeze-saver"), "" if has_savers else "checkpoint.async_save is false"),
        }
        for kind in [kind for kind in kinds if reasons.get(kind)]:
            self._report.line(f"no {kind}: {reasons[kind]}")
        return [kind for kind in kinds if not reasons.get(kind)]


def claim(work: Path) -> None:
    """Make the work folder, or take one that an earlier soak has made. Raise CannotRun if it may be somebody else's."""
    if work.exists() and not (work / _MARK).exists() and (not work.is_dir() or any(work.iterdir())):
        raise CannotRun(f"--work {work} is not empty, and no earlier soak has made it; give a new folder")
    work.mkdir(parents=True, exist_ok=True)
    (work / _MARK).touch()


def _servers(python: Path) -> list[str]:
    return [*_SERVERS, f"rollout.sglang.python={python.absolute()}"]


def _above(kind: type[int | float], limit: int) -> Callable[[str], int | float]:
    """Return a reader of numbers above `limit`, for argparse."""

    def number(text: str) -> int | float:
        value = kind(text)
        if not limit < value < math.inf:
            raise argparse.ArgumentTypeError(
                f"{text} is not above {limit}, so nothing would be tried; give a larger number"
            )
        return value

    return number


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=_above(float, 0), default=30, help="no round begins after this time")
    parser.add_argument("--seed", type=int, default=0, help="of the events and of the run")
    parser.add_argument("--ranks", type=_above(int, 0), default=2, help="processes of a run")
    parser.add_argument("--steps", type=_above(int, 1), default=16, help="rollout steps of a round")
    parser.add_argument("--events", type=_above(int, 0), default=4, help="events of a round")
    parser.add_argument("--kinds", help=f"separated by commas; all by default: {', '.join(KINDS)}")
    parser.add_argument("--sglang", type=Path, metavar="PYTHON", help="use real servers; compares the steps alone")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/soak"),
        help="a folder of soak's own, new or of an earlier soak (runs/soak)",
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="configuration values to replace")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
