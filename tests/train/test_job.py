"""Ranks of a whole job that die, fail or are told to end at named places: no other rank waits for them, and the next start goes on to
the bits of an undisturbed run. hit_ranks.py starts and hits them."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.train.runs import QUICKSTART, SMALL, python
from tests.train.same_run import assert_same_run

OPTIONS = ["warm_start=null", "eval.sets={}", "checkpoint.every=1", "parallel.tensor_parallel=1"]
OPTIONS += ["observe.tensorboard=false", "observe.plot_at_end=false"]
FULL = "cannot be written: No space left on device; free some space on its disk and start again: it goes on from runs/hit/checkpoints/"


class Hit(NamedTuple):
    """A hit of hit_ranks.py, the status of the rank that is hit, and what torchrun is told of it."""

    rank: int
    place: str
    how: str
    status: int
    told: str | None


FEW = [
    Hit(1, "forward", "SIGKILL", -signal.SIGKILL, None),
    Hit(0, "backward", "SIGKILL", -signal.SIGKILL, None),
    Hit(1, "optimizer", "a mistake in code", 1, "ValueError: a mistake in code"),
    Hit(1, "save", "disk full", 2, FULL),
    Hit(0, "forward", "SIGSTOP", -signal.SIGKILL, " is stopped, by SIGSTOP or a debugger, for "),
    Hit(1, "save", "SIGTERM", 143, None),
]
MANY = [Hit(rank, place, "SIGKILL", -9, None) for place in ("scatter", "optimizer", "sync", "save") for rank in (0, 1)]
MANY += [
    Hit(rank, place, "SIGTERM", 143, None) for place in ("scatter", "forward", "optimizer", "sync") for rank in (0, 1)
]


@pytest.mark.parametrize("hits", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
def test_a_job_that_is_hit_ends_on_all_ranks_and_goes_on_to_the_same_bits(task: Path, hits: list[Hit]) -> None:
    done_by_starts = sum(2 if hit.how == "SIGTERM" else 1 for hit in hits)  # SIGTERM saves the step that it interrupts
    steps, name = f"num_rollout_steps={done_by_starts + 2}", f"hit-{len(hits)}"
    arguments = ["-m", "tests.train.hit_ranks"]
    whole = python(task, *arguments, "[[]]", QUICKSTART, *SMALL, *OPTIONS, steps, f"name=whole-{len(hits)}", merge=True)
    assert whole.returncode == 0, whole.stdout
    given = json.dumps([*(hit[:3] for hit in hits), []])
    done = python(task, *arguments, given, QUICKSTART, *SMALL, *OPTIONS, steps, f"name={name}", merge=True)
    starts = [json.loads(text.splitlines()[0]) for text in done.stdout.split("ENDED ")[1:]]
    assert len(starts) == len(hits) + 1 and starts[-1]["statuses"] == [0, 0], done.stdout
    for hit, start in zip(hits, starts):
        other = start["statuses"][1 - hit.rank]
        assert start["statuses"][hit.rank] == hit.status and other not in (0, -signal.SIGKILL), (hit, done.stdout)
        assert (hit.told or "").replace("/hit/", f"/{name}/") in (start["told"][hit.rank] or ""), (hit, done.stdout)
    assert_same_run(task / f"runs/whole-{len(hits)}", task / "runs" / name)
