"""Wall time of the phases of a rollout step, and of the phases between steps.

Change here: which phases exist, which belong to a step, and how nested phases share their time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

StepPhase = Literal["generate", "reward", "filter", "logprob", "train", "record", "wait", "sync"]
OtherPhase = Literal["start", "eval", "save"]
"""Phases between steps. Their time does not count as the step's."""
Phase = StepPhase | OtherPhase
OTHER_PHASES: tuple[str, ...] = get_args(OtherPhase)
PHASES: tuple[str, ...] = (*get_args(StepPhase), *OTHER_PHASES)


class PhaseTimer:
    """Seconds spent in each phase since the last `pop`.

    Time counts for the innermost open phase only, so the phases never sum to more than the step. A repeated phase
    accumulates. A timer belongs to one thread. Example: 3 s in generate, of which 1 s in a nested reward, is generate 2 s and reward 1 s.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}
        self._step_start = self._mark = clock()

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Add the time of the block to phase `name`, even if the block raises."""
        assert name in PHASES, f"unknown phase {name!r}; phases are {', '.join(PHASES)}"
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def pop(self) -> dict[str, float]:
        """Return `time/<phase>_s` of every phase and `time/step_s`, all since the last pop, and reset the timer.

        `time/step_s` is the whole time, with time outside any phase, but without the phases between steps.
        """
        self._charge()
        times = {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}
        between = sum(self._seconds.get(name, 0.0) for name in OTHER_PHASES)
        times["time/step_s"] = self._mark - self._step_start - between
        self._seconds, self._step_start = {}, self._mark
        return times

    def _charge(self) -> None:
        """Add the time since the last event to the innermost open phase."""
        now = self._clock()
        if self._open:
            name = self._open[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._mark
        self._mark = now
