"""A round: a run from its first step to its last, with events in between. Then it is compared with the undisturbed run.

Change here: how the soak waits for an event, what counts as recovered, and when a run is given up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from shutil import rmtree
from typing import NamedTuple

from tools.soak.events import KINDS, SAVING, Event, Kind
from tools.soak.job import NAME, Job, Setup, View, kill_family
from tools.soak.leftovers import leftovers, shared_names
from tools.soak.strikes import LeftOut, strike

LIMIT_S = 300.0
"""A run that neither ends nor finishes a step for this long is given up. The watchdog needs a minute and a half."""
NO_EVENT = "no event"
_MAX_USELESS_STARTS = 4
_POLL_S = 0.005
_LATE_STEPS = 2
"""Steps after which an event strikes although its phase was not seen: at least one of them saves."""


class Outcome(NamedTuple):
    """What followed an event.

    kind, at    the event, and where it struck. The kind is "no event" for an end without one.
    status      torchrun's exit status; None if it did not end.
    exit_s      seconds from the event to the end of torchrun and all ranks.
    next_s      seconds from the event to the end of the next rollout step; None if there was none.
    repeated    rollout steps that were done again.
    words       the telling line of the run's output.
    left_out    why the event was not done; empty if it was.
    """

    kind: str
    at: str
    status: int | None = None
    exit_s: float | None = None
    next_s: float | None = None
    repeated: int = 0
    words: str = ""
    left_out: str = ""


class RoundResult(NamedTuple):
    """A finished round. `problems` are differences, leftovers, and what else must not be; empty if all is well."""

    number: int
    max_restarts: int
    seconds: float
    starts: int
    outcomes: list[Outcome]
    problems: list[str]


class GivenUp(Exception):
    """The run does not go on."""


class Recovery:
    """Sees when a run goes on after an event: its ranks, or their successors, finish a step.

    steps     steps that they must finish: what has become of a save beside training is known at the next save.
    next_at   when the first one was done; None before that.
    """

    def __init__(self, before: View, kind: Kind):
        self._before, self._ends = before, kind.ends
        self._steps = _LATE_STEPS + 1 if kind.phase == SAVING else 1
        self._resumed: int | None = None
        self.next_at: float | None = None

    @property
    def repeated(self) -> int:
        return max(0, self._before.step - (self._before.step if self._resumed is None else self._resumed))

    def is_seen(self, view: View) -> bool:
        since = self._since(view)
        if since is None or view.step <= since:
            return False
        self.next_at = self.next_at or time.monotonic()
        return view.step >= since + self._steps

    def _since(self, view: View) -> int | None:
        """Return the last step before the run went on; None while it does not."""
        if set(view.pids.values()) & set(self._before.pids.values()):
            return None if self._ends else self._before.step
        if (
            self._resumed is None
            and len(view.pids) == len(self._before.pids)
            and not {"", "start"} & {*view.phases.values()}
        ):
            self._resumed = view.step
        return self._resumed


class Round:
    """Runs one round in a folder that it empties. `tell` gets every outcome, `show` the state many times a second."""

    def __init__(
        self,
        setup: Setup,
        number: int,
        max_restarts: int,
        folder: Path,
        tell: Callable[[Outcome], None],
        show: Callable[[str], None],
    ):
        self._setup, self._number, self._max_restarts, self._folder = setup, number, max_restarts, folder
        self._tell, self._show = tell, show
        self._log = setup.work / f"round-{number:03d}.log"
        self._outcomes: list[Outcome] = []
        self._problems: list[str] = []
        self._without_samples: set[int] = set()
        self._starts = self._useless = 0
        self._saved = -1

    def run(self, events: Sequence[Event], reference: Path, *, bitwise: bool) -> RoundResult:
        """Run to the last step, and compare."""
        from tools.soak.oracle import differences  # torch: seconds that a wrong option need not wait for

        begin, known = time.monotonic(), shared_names()
        rmtree(self._folder / NAME, ignore_errors=True)
        self._log.unlink(missing_ok=True)
        job = self._start()
        try:
            for event in events:
                job = self._meet(event, job)
            job = self._wait(job, lambda job: job.is_finished())
            self._problems += differences(
                reference, job.run_dir, bitwise=bitwise, without_samples=self._without_samples
            )
        except GivenUp as error:
            self._problems.append(f"given up: {error}")
            kill_family(self._setup.mark)
        self._problems += self._left(job, known)
        seconds = time.monotonic() - begin
        return RoundResult(self._number, self._max_restarts, seconds, self._starts, self._outcomes, self._problems)

    def _meet(self, event: Event, job: Job) -> Job:
        """Wait for the moment of the event and let it strike. Return the job that goes on."""
        job = self._wait(job, lambda job: job.is_finished() or is_due(event, job.view()))
        if job.is_finished():
            self._record(Outcome(event.kind, "the end", left_out="the run was done"))
            return job
        begin, log, before = time.monotonic(), job.log_end(), job.view()
        at = f"step {before.step + 1}, {before.phases.get(event.rank) or 'between phases'}, rank {event.rank}"
        outcome, striking = Outcome(event.kind, at), strike(event, job, self._folder, self._setup.mark)
        try:
            next(striking)
        except LeftOut as reason:
            outcome = outcome._replace(left_out=str(reason))
            if not job.has_ended():
                self._record(outcome)
                return job
        recovery = Recovery(before, KINDS[event.kind])

        def is_over(job: Job) -> bool:
            lasts = next(striking, self) is not self
            return job.has_ended() or (not lasts and recovery.is_seen(job.view()))

        try:
            self._wait_for_one(job, is_over)
        finally:
            striking.close()
        if event.kind == "disk-full":  # a run without room for samples says so and trains on
            self._without_samples |= {*range(before.step, job.last_step() + 2)}
        if job.has_ended():
            outcome = outcome._replace(status=job.status, exit_s=time.monotonic() - begin)
        if job.has_ended() and not job.is_finished():
            job = self._start_again(job)
            job = self._wait(job, lambda job: job.is_finished() or recovery.is_seen(job.view()))
        next_s = recovery.next_at and recovery.next_at - begin
        self._record(outcome._replace(next_s=next_s, repeated=recovery.repeated, words=job.words(log)))
        self._check_damage(outcome, job)
        return job

    def _check_damage(self, outcome: Outcome, job: Job) -> None:
        """Only a flipped byte may have made a run set a checkpoint aside, and it must have."""
        aside = [*job.run_dir.glob("checkpoints/*.corrupt*")]
        wanted = int(outcome.kind == "flip-byte" and not outcome.left_out)
        if len(aside) != wanted:
            self._problems.append(f"{len(aside)} checkpoints were set aside after {outcome.kind}, not {wanted}")
        for path in aside:
            rmtree(path)

    def _wait(self, job: Job, is_so: Callable[[Job], bool]) -> Job:
        """Wait until it is so. Start the run again if it ends meanwhile. Return the job that runs then."""
        while True:
            self._wait_for_one(job, lambda job: job.has_ended() or is_so(job))
            if not job.has_ended() or job.is_finished():  # what was so for a moment need not be so still
                return job
            self._record(Outcome(NO_EVENT, f"step {job.last_step() + 1}", status=job.status, words=job.words()))
            job = self._start_again(job)

    def _wait_for_one(self, job: Job, is_so: Callable[[Job], bool]) -> None:
        """Wait until it is so. Raise GivenUp if the run makes no progress meanwhile."""
        step, begin = job.last_step(), time.monotonic()
        while not is_so(job):
            if job.last_step() != step:
                step, begin = job.last_step(), time.monotonic()
            if time.monotonic() - begin > LIMIT_S:
                raise GivenUp(f"no progress for {LIMIT_S:.0f} s at step {step + 1}, in phases {job.view().phases}")
            self._show(f"round {self._number}, start {self._starts}, step {step}/{self._setup.num_steps}")
            time.sleep(_POLL_S)

    def _start(self) -> Job:
        self._starts += 1
        return Job(self._setup, self._folder, self._log, self._max_restarts)

    def _start_again(self, job: Job) -> Job:
        """Start the run again, as a batch system does. Raise GivenUp if that has not helped several times."""
        saved = job.saved_step()
        self._useless, self._saved = self._useless + 1 if saved == self._saved else 0, saved
        if self._useless > _MAX_USELESS_STARTS:
            raise GivenUp(f"{self._useless} starts from step {saved} have ended: {job.words()}")
        return self._start()

    def _left(self, job: Job, known: frozenset[str]) -> list[str]:
        """Return what the round has left, and remove it, so that the next round does not find it again."""
        setup = self._setup
        found = leftovers(setup.mark, job.run_dir, setup.temporary, known)
        kill_family(setup.mark)
        rmtree(setup.temporary)
        setup.temporary.mkdir()
        return [f"left over: {line}" for line in found]

    def _record(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        self._tell(outcome)


def is_due(event: Event, view: View) -> bool:
    """Return True if the run is where the event strikes, or past it."""
    if not view.pids:
        return False
    is_there = view.is_saving if event.phase == SAVING else view.phases.get(event.rank) == event.phase
    return (is_there and view.step >= event.step - 1) or view.step >= event.step + _LATE_STEPS
