"""What happens to a run, and when: a list of events that depends on the seed alone.

Change here: the kinds of events, and how often each comes.

An event comes when the run is at a rollout step and in a phase, not at a time of the clock, so a seed gives nearly the same soak
on a fast and on a slow machine. If the phase passes unseen, the event comes when the step is done.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

SAVING = "saving"
"""The time while a folder `*.partial` exists. It may lie beside training."""
PHASES = ("start", "generate", "logprob", "train", "sync", "save")


class Kind(NamedTuple):
    """A kind of event.

    ends    the job or all its ranks end; False if the run goes on by itself.
    phase   the only phase in which it makes sense; None for any.
    """

    ends: bool
    phase: str | None = None


KINDS = {
    "kill-rank": Kind(ends=True),
    "kill-torchrun": Kind(ends=True),
    "kill-all": Kind(ends=True),
    "kill-saver": Kind(ends=False, phase=SAVING),
    "kill-server": Kind(ends=False, phase="generate"),
    "term": Kind(ends=True),
    "term-twice": Kind(ends=True),
    "stop-file": Kind(ends=True),
    "freeze": Kind(ends=False),
    "freeze-saver": Kind(ends=False, phase=SAVING),
    "freeze-for-good": Kind(ends=True),
    "disk-full": Kind(ends=False, phase="train"),
    "delete-partial": Kind(ends=False, phase=SAVING),
    "flip-byte": Kind(ends=True),
}
"""kill-all and flip-byte kill every process of the run, as if the machine died. term-twice sends the second SIGTERM up to 3 s after
the first. freeze stops a process for some seconds (SIGSTOP, SIGCONT), freeze-for-good until the watchdog ends the run."""


class Event(NamedTuple):
    """Something that happens to the run.

    step, phase   where the run is then: rollout step `step` is not finished.
    rank          the rank that it happens to, or whose process it is.
    luck          a number in [0, 1) for what else is random: seconds, the place of a byte.
    """

    kind: str
    step: int
    phase: str
    rank: int
    luck: float

    def __str__(self) -> str:
        return f"{self.kind} at step {self.step} ({self.phase}), rank {self.rank}"


def schedule(
    seed: int, round_number: int, num_events: int, *, num_steps: int, num_ranks: int, kinds: Sequence[str]
) -> list[Event]:
    """Return the events of a round, in the order of steps. Over the rounds of a soak all kinds come equally often."""
    first = round_number * num_events
    bags = range(first // len(kinds), (first + num_events) // len(kinds) + 1)
    drawn = list(chain.from_iterable(_shuffled(f"{seed} bag {bag}", kinds) for bag in bags))
    start = first % len(kinds)
    luck = random.Random(f"{seed} round {round_number}")
    steps = sorted(luck.randint(1, num_steps) for _ in range(num_events))
    return [
        Event(kind, step, KINDS[kind].phase or luck.choice(PHASES), luck.randrange(num_ranks), round(luck.random(), 3))
        for kind, step in zip(drawn[start : start + num_events], steps)
    ]


def max_restarts(seed: int, round_number: int) -> int:
    """Return torchrun's --max-restarts for a round; with 0 the soak itself starts the job again, as a batch system does."""
    return random.Random(f"{seed} restarts {round_number}").choice((0, 3))


def _shuffled(seed: str, kinds: Sequence[str]) -> list[str]:
    return random.Random(seed).sample(list(kinds), len(kinds))
