"""What the watchdogs of a job's nodes tell each other: small files in the run's folder, which all nodes share for checkpoints.

    SHARED/node-3.json     the ranks of node 3, and a number that grows with each writing
           alarm           the job hangs: every node writes the stacks of its ranks
           stacks-3.json   by rank
           verdict.json    which ranks are guilty: every node ends its ranks

Each round costs a node one file written and one name looked up; node 0 also reads one file per node, and node 1 that of node 0.
Rounds are so far apart that the whole job writes at most _FILES_PER_S files per second.

Change here: how often nodes tell each other what they see, and what a watchdog does if the disk does not answer.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from dapo_mcore.process.hang import RankState

T = TypeVar("T")

_INTERVAL_S = 5.0
_FILES_PER_S = 8.0
_LOOK_S = 1.0
"""Seconds between two looks for a file: up to all nodes ask the same server."""
_LATE = 3
"""Rounds without reading after which the time of silence begins again: what kept this node may have kept the others."""


class Disk:
    """Calls functions that use a disk, and goes on without a disk that does not answer."""

    def __init__(self, patience_s: float = 30.0):
        self._patience_s = patience_s
        self._pending: Future[Any] | None = None

    @property
    def is_stuck(self) -> bool:
        """True while a call has not returned."""
        return self._pending is not None and not self._pending.done()

    def do(self, action: Callable[[], T]) -> T | None:
        """Return `action()`. Return None if it fails, does not return within `patience_s`, or an earlier one still has not."""
        if self.is_stuck:
            return None
        self._pending = pending = Future()
        Thread(target=_run, args=(action, pending), daemon=True).start()
        with suppress(OSError, TimeoutError):
            return pending.result(self._patience_s)
        return None


class Exchange:
    """The files of one node's watchdog. No method raises an error of the disk, or waits long for it.

    silent_s    A node that has written nothing for this long counts as silent.
    clock       tells seconds; see WatchedTime.
    interval_s  seconds between two rounds; 0: as many as the number of nodes needs.
    """

    def __init__(
        self,
        folder: Path,
        node: int,
        num_nodes: int,
        silent_s: float,
        clock: Callable[[], float],
        disk: Disk,
        interval_s: float = 0.0,
    ):
        self._folder, self._node, self._num_nodes = folder, node, num_nodes
        self._silent_s, self._clock, self._disk = silent_s, clock, disk
        self.interval_s = interval_s or max(_INTERVAL_S, num_nodes / _FILES_PER_S)
        self._beats: dict[int, tuple[int, float]] = defaultdict(lambda: (-1, clock()))
        self._beat, self._told_at, self._read_at = 0, -math.inf, time.monotonic()

    @property
    def is_due(self) -> bool:
        """True once per round; always in a job of one node, which tells nobody."""
        return self._num_nodes == 1 or time.monotonic() - self._told_at >= self.interval_s

    @property
    def leads(self) -> bool:
        """True on the node that judges: node 0, or node 1 if node 0 is silent. A node without a disk knows only its own ranks, and
        judges them."""
        return self._reads_all or self._disk.is_stuck

    def tell(self, own: Sequence[RankState]) -> None:
        """Tell the other nodes the states of this node's ranks."""
        if self._num_nodes > 1:
            self._beat, self._told_at = self._beat + 1, time.monotonic()
            self.write(f"node-{self._node}.json", json.dumps([self._beat, own]))

    def others(self) -> list[RankState]:
        """Return the ranks of all other nodes on the node that judges; before, those of node 0 on node 1, and none elsewhere. Ranks of a
        silent node have the condition "silent"."""
        if self._node > 1 or self._num_nodes == 1:
            return []
        return self._disk.do(self._read_others) or []

    def write(self, name: str, text: str) -> None:
        """Write a file of the folder as a whole."""
        self._disk.do(lambda: self._put(self._folder / name, text))

    def read(self, *names: str) -> list[Any]:
        """Return the contents of the files; None for each that is not there."""
        return self._disk.do(lambda: [_json(self._folder / name) for name in names]) or [None for _ in names]

    def has(self, *names: str) -> bool:
        """Return True if all files are there."""
        return bool(self._disk.do(lambda: all((self._folder / name).exists() for name in names)))

    def wait_for(self, *names: str, timeout_s: float) -> None:
        """Wait until all files are there, for `timeout_s` at most."""
        end = time.monotonic() + timeout_s
        while not self.has(*names) and time.monotonic() < end and not self._disk.is_stuck:
            time.sleep(min(_LOOK_S, self.interval_s))

    def remove(self) -> None:
        """Delete the folder."""
        self._disk.do(lambda: shutil.rmtree(self._folder, ignore_errors=True))

    @property
    def _reads_all(self) -> bool:
        return self._node == 0 or (self._node == 1 and self._is_silent(0))

    def _is_silent(self, node: int) -> bool:
        return self._clock() - self._beats[node][1] > self._silent_s

    def _read_others(self) -> list[RankState]:
        now = time.monotonic()
        if now - self._read_at > _LATE * self.interval_s:
            self._beats.clear()
        self._read_at = now
        states = self._states_of(1 - self._node)
        rest = range(2, self._num_nodes if self._reads_all else 0)
        return states + [state for node in rest for state in self._states_of(node)]

    def _states_of(self, node: int) -> list[RankState]:
        beat, states = _json(self._folder / f"node-{node}.json") or (-1, [])
        if beat != self._beats[node][0]:
            self._beats[node] = beat, self._clock()
        read = [RankState(*state) for state in states]
        if not self._is_silent(node):
            return read
        silent_s = self._clock() - self._beats[node][1]
        return [s if s.condition == "left" else s._replace(condition="silent", condition_s=silent_s) for s in read]

    def _put(self, path: Path, text: str) -> None:
        if self._beat <= 1:  # later it may have been deleted as the job has ended
            path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path.with_name(f"{path.name}.{self._node}.partial"), path, text)


def write_whole(partial: Path, path: Path, text: str) -> None:
    """Write `path` as a whole, by way of `partial`."""
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _run(action: Callable[[], T], outcome: Future[T]) -> None:
    try:
        outcome.set_result(action())
    except Exception as error:
        outcome.set_exception(error)


def _json(path: Path) -> Any:
    with suppress(FileNotFoundError, ValueError):
        return json.loads(path.read_bytes())
    return None
