"""Whether a job hangs, and which rank is the cause. No processes and no files: only what is known of the ranks.

Change here: how long a phase may go on without progress, and which rank is called guilty.

A rank that waits in a control collective is never the reason for an alarm: while rank 0 generates for an hour, or writes for an
hour, the others wait that long. It is rank 0 that must go on then.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

_FACTORS = {"start": 2, "save": 2, "generate": 4, "logprob": 1, "train": 1, "sync": 1}
_OTHER_FACTOR = 2
"""Limits, in units of parallel.hang_minutes. logprob and train show progress with each micro-batch, but the first one may compile.
generate shows it with each finished response, and long ones may begin late. start reads weights and starts servers; a save writes
the whole share of a rank. The other phases are rank 0's own work between these."""
_WAITING_CODE = ("torch/distributed/", "pipeline_parallel/p2p_communication.py", "param_and_grad_buffer.py")
_MOST_RANKS = 8
_LONGER = "If this may take so long, raise parallel.hang_minutes"

Condition = Literal["runs", "stopped", "gone", "silent", "left"]


class Limits(NamedTuple):
    """How long a job may stand still.

    minutes     parallel.hang_minutes; see `limit_s`.
    dead_s      a process is stopped or gone: time for a person to continue it, and for torchrun to notice its end.
    disagree_s  all ranks wait in collectives: the last one may have to wake up on a busy machine.
    silent_s    a node shows no sign of life: more than a network disk's cache keeps an old file.
    lost_s      once the guilty rank is killed: most ranks see a lost connection, and end by themselves.
    clean_s     after SIGTERM: rank 0 stops its servers.
    """

    minutes: float
    dead_s: float = 60.0
    disagree_s: float = 120.0
    silent_s: float = 180.0
    lost_s: float = 15.0
    clean_s: float = 15.0


class RankState(NamedTuple):
    """What is known of a rank.

    node                              name of its machine
    pid, phase, waits_for, num_waits  as in beacon.py
    age_s                             seconds since its last sign of progress
    condition, condition_s            the process runs, is stopped or gone, has left as it should, or is on a node that shows no sign of
                                      life; for how long
    """

    rank: int
    node: str
    pid: int
    phase: str
    waits_for: str
    num_waits: int
    age_s: float
    condition: Condition
    condition_s: float

    @property
    def works(self) -> bool:
        return self.condition == "runs" and not self.waits_for

    @property
    def place(self) -> tuple[int, str, str]:
        """What is the same on ranks that wait for each other."""
        return self.num_waits, self.phase, self.waits_for


class Verdict(NamedTuple):
    """The ranks that are the cause, none if nothing tells them from the others, and the line for a user."""

    guilty: tuple[int, ...]
    message: str


def limit_s(phase: str, minutes: float) -> float:
    """Return the seconds that a rank may work in a phase without progress."""
    return 60 * minutes * _FACTORS.get(phase, _OTHER_FACTOR)


def hangs(states: Sequence[RankState], limits: Limits) -> bool:
    """Return True if the job will not go on by itself."""
    here = [state for state in states if state.condition != "left"]
    seen = [state for state in here if state.condition != "silent"]
    if any(state.condition in ("stopped", "gone") and state.condition_s > limits.dead_s for state in seen):
        return True
    if any(state.works and state.age_s > limit_s(state.phase, limits.minutes) for state in seen):
        return True
    if len(seen) < len(here):  # only the watchdog of that node may have ended: the others' progress would show it
        return all(state.age_s > limits.silent_s for state in seen)
    return bool(here) and all(state.waits_for and state.age_s > limits.disagree_s for state in here)


def judge(states: Sequence[RankState], stacks: Mapping[int, str]) -> Verdict:
    """Return which ranks are the cause of a hang.

    stacks  by rank, as faulthandler writes them; ranks may be missing.

    The first rule that finds a rank decides: it is stopped, gone or silent; it is in its own code while others are in collectives; it is
    not where most ranks are.
    """
    here = [state for state in states if state.condition != "left"]
    dead = [state for state in here if state.condition != "runs"]
    busy = [state for state in here if state.works and _is_busy(stacks.get(state.rank, ""))]
    place, num_there = Counter(state.place for state in here).most_common(1)[0]
    apart = [state for state in here if state.place != place] if 2 * num_there > len(here) else []
    guilty = dead or (busy if len(busy) < len(here) else []) or apart
    ranks = tuple(state.rank for state in guilty)
    if not guilty:
        return Verdict((), f"hang: no rank stands out: {_by_place(here)}; see the stacks above. {_LONGER}")
    others = [state for state in here if state.rank not in ranks]
    waiting = f"; {_listed(others)} {'waits' if len(others) == 1 else 'wait'} for it" if others else ""
    more = f" (and {len(guilty) - 1} more)" if len(guilty) > 1 else ""
    return Verdict(ranks, f"hang: {_accused(guilty[0])}{more}{waiting}. {_advice(guilty[0])}")


def _by_place(states: Sequence[RankState]) -> str:
    places: dict[tuple[int, str, str], list[RankState]] = defaultdict(list)
    for state in states:
        places[state.place].append(state)
    return "; ".join(
        f"{_listed(same)} {'is' if len(same) == 1 else 'are'} {_doing(same[0])}" for same in places.values()
    )


def _accused(state: RankState) -> str:
    who = f"rank {state.rank} on {state.node} (process {state.pid})"
    if state.condition == "stopped":
        return f"{who} is stopped, by SIGSTOP or a debugger, for {state.condition_s:.0f} s, {_doing(state)}"
    if state.condition == "silent":
        return f"node {state.node}, with rank {state.rank}, has shown no sign of life for {state.condition_s:.0f} s"
    if state.condition == "gone":
        return f"{who} has ended without a message, {_doing(state)}"
    return f"{who} is {_doing(state)}"


def _advice(state: RankState) -> str:
    if state.condition == "gone":
        return f"dmesg on {state.node} says whether the kernel has killed it because memory ran out"
    if state.condition == "silent":
        return f"Is {state.node} up, and does it reach the disk of the run?"
    return _LONGER if state.condition == "runs" else "The same command goes on from the newest checkpoint"


def _doing(state: RankState) -> str:
    where = f"in phase {state.phase}" if state.phase else "between two phases"
    waiting = f", waiting in collective {state.num_waits} ({state.waits_for})" if state.waits_for else ""
    return f"{where}{waiting}, without progress for {state.age_s:.0f} s"


def _listed(states: Sequence[RankState]) -> str:
    numbers = ", ".join(str(state.rank) for state in states[:_MOST_RANKS])
    more = f" and {len(states) - _MOST_RANKS} more" if len(states) > _MOST_RANKS else ""
    return f"rank{'s' if len(states) > 1 else ''} {numbers}{more}"


def main_thread(stacks: str) -> str:
    """Return the lines of the main thread, innermost first. py-spy names it, faulthandler writes it last."""
    _, *parts = re.split(r"^((?:Current thread|Thread) .*)$", stacks, flags=re.MULTILINE)
    threads = list(zip(parts[::2], parts[1::2]))
    named = [lines for head, lines in threads if "MainThread" in head]
    return (named or [lines for _, lines in threads] or [""])[-1].strip("\n")


def _is_busy(stacks: str) -> bool:
    """Return True if the main thread is not in code that waits for other ranks. False if it is in a backward pass: the collectives
    there have no Python frame."""
    innermost = next(iter(main_thread(stacks).splitlines()), "_engine_run_backward")
    return not any(code in innermost for code in (*_WAITING_CODE, "_engine_run_backward"))
