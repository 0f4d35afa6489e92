"""The watchdog: a process per node that reads the beacons of the node's ranks, and ends a job that hangs.

    python -m dapo_mcore.process.watchdog WATCH     started by the first rank of each node, see `start_watchdog`

It is no thread of a rank, as a rank that hangs may hold the GIL or be stopped. Nodes tell each other what they see (exchange.py).
Node 0's process judges; node 1's does if node 0 is silent.

Change here: how ranks are observed and ended. What a hang is, and who is guilty, is in hang.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from dapo_mcore.process.beacon import (
    DUMP,
    Beacon,
    BeaconReader,
    Note,
    NullBeacon,
    error_file_of,
    remove_dead,
    stack_file,
)
from dapo_mcore.process.exchange import Disk, Exchange, write_whole
from dapo_mcore.process.exit_status import write_failure
from dapo_mcore.process.hang import Condition, Limits, RankState, Verdict, hangs, judge, main_thread
from dapo_mcore.process.launcher import is_torchrun
from dapo_mcore.process.stop_file import REQUEUE

LOGS = "logs"
"""Folder of a run in which launchers and watchdogs of several starts have folders of their own."""
_POLL_S = 0.5
_LONGEST_PAUSE_S = 5.0
_STACKS_S = 5.0
_PY_SPY_S = 10.0
_ALL_STACKS_S = 60.0
_KILLED_S = 10.0
_ENDED, _STOPPED = ("", "Z", "X"), ("T", "t")
"""Letters of /proc/PID/stat: no such process, or one that its parent has not waited for; stopped by a signal or a debugger."""
_REPEAT_S = 3.0
"""More than signals.REPEAT_S: a second SIGTERM ends a run that defers the first one."""


class Watch(NamedTuple):
    """What a watchdog is told.

    folder     beacons of this node's ranks; deleted at the end.
    shared     folder of this attempt, which all nodes see.
    node       this node's number, of num_nodes.
    remove     folders in memory that a killed rank leaves, such as weights for servers.
    requeue    file that tells a batch script that the job hung and may be started again; empty: none.
    exchange_s how often nodes tell each other what they see; 0: as often as Exchange says.
    """

    folder: str
    shared: str
    node: int
    num_nodes: int
    limits: Limits
    remove: tuple[str, ...] = ()
    requeue: str = ""
    exchange_s: float = 0.0


def watch_job(
    environment: Mapping[str, str], attempt: str, run_dir: Path, minutes: float | None, remove: Sequence[Path] = ()
) -> NullBeacon:
    """Return this rank's beacon, and let the node's first rank start the watchdog. One that tells nothing, without torchrun or
    `minutes`: then there is nobody to start the job again, or the user wants no watchdog.

    attempt  a name that this start of the job alone has.
    remove   folders in memory that a killed rank leaves; deleted once all ranks of the first node have ended.
    """
    if minutes is None or not is_torchrun(environment):
        return NullBeacon()
    node, rank = int(environment["GROUP_RANK"]), int(environment["RANK"])
    temporary = Path(tempfile.gettempdir())
    folder = temporary / f"dapo_mcore-{attempt}-{node}"
    if environment["LOCAL_RANK"] == "0":
        remove_dead(temporary.glob("dapo_mcore-*-*"))
    folder.mkdir(mode=0o700, exist_ok=True)
    beacon = Beacon(folder, rank, environment.get("TORCHELASTIC_ERROR_FILE", ""))
    if environment["LOCAL_RANK"] == "0":
        shared, num_nodes = run_dir.absolute() / LOGS / f"watch-{attempt}", int(environment["GROUP_WORLD_SIZE"])
        left = tuple(map(str, remove)) if node == 0 else ()
        requeue = str(run_dir.absolute() / REQUEUE)
        start_watchdog(Watch(str(folder), str(shared), node, num_nodes, Limits(minutes), left, requeue))
    return beacon


def start_watchdog(watch: Watch) -> subprocess.Popen[bytes]:
    """Start the node's watchdog. It ends with the ranks. torchrun does not signal it, as it has a session of its own."""
    command = [sys.executable, "-m", "dapo_mcore.process.watchdog", json.dumps(watch)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


class WatchedTime:
    """A clock that stands still while this process does: Slurm may suspend a whole job for a night."""

    def __init__(self) -> None:
        self._seconds, self._last = 0.0, time.monotonic()

    def __call__(self) -> float:
        now = time.monotonic()
        self._seconds += min(now - self._last, _LONGEST_PAUSE_S)
        self._last = now
        return self._seconds


class Ranks:
    """The ranks of this node: their beacons and processes."""

    def __init__(self, folder: Path, clock: Callable[[], float]):
        self._folder, self._reader, self._clock = folder, BeaconReader(folder), clock
        self._notes: dict[int, Note] = {}
        self._started: dict[int, str] = {}
        self._seen: dict[tuple[int, str], tuple[Any, float]] = {}

    def look(self) -> list[RankState]:
        """Return the states of all ranks, in rank order."""
        self._notes |= {note.rank: note for note in self._reader.read()}
        return [self._state(note) for note in self._notes.values()]

    def dump(self, states: Sequence[RankState]) -> dict[int, str]:
        """Return the stacks of the ranks that are alive. One that is stopped has some only if py-spy is installed and may look."""
        alive = [state for state in states if state.condition in ("runs", "stopped")]
        for state in alive:
            _signal(state, DUMP)
        _wait(lambda: all(self._has_stacks(state.rank) for state in alive if state.condition == "runs"), _STACKS_S)
        texts = {state.rank: self._written(state.rank) or _py_spy(state.pid) for state in alive}
        return {rank: text for rank, text in texts.items() if text}

    def end(self, guilty: Sequence[int], limits: Limits) -> None:
        """End all ranks: the guilty ones by force, the others so that they can clean up."""
        for state in self.look():
            if state.rank in guilty:
                _signal(state, signal.SIGKILL)
        if guilty and self._ended(limits.lost_s):
            return
        for _ in range(2):
            self._send(signal.SIGTERM)
            if self._ended(_REPEAT_S):
                return
        if not self._ended(limits.clean_s):
            self._send(signal.SIGKILL)
            self._ended(_KILLED_S)

    def tell_torchrun(self, verdict: Verdict) -> None:
        """Leave the message in the error files of the guilty ranks, or of rank 0 if there are none. What a rank has written itself is
        the better one."""
        for rank in set(verdict.guilty or (0,)) & self._notes.keys():
            path = error_file_of(self._folder, rank)
            if path and not os.path.exists(path):
                write_failure(path, str(rank), verdict.message)

    def all_ended(self) -> bool:
        """Return True if no rank's process is left, also of those that have said that they end."""
        self.look()
        return self._ended(0.0)

    def _ended(self, timeout_s: float) -> bool:
        return _wait(lambda: not any(self._letter(note) for note in self._notes.values()), timeout_s)

    def _send(self, number: int) -> None:
        for state in self.look():
            _signal(state, number)

    def _state(self, note: Note) -> RankState:
        condition = self._condition(note)
        told = note.phase, note.waits_for, note.num_waits, self._unchanged_s(note.rank, "note", note.since)
        condition_s = self._unchanged_s(note.rank, "condition", condition)
        return RankState(note.rank, socket.gethostname(), note.pid, *told, condition, condition_s)

    def _unchanged_s(self, rank: int, what: str, value: Any) -> float:
        now = self._clock()
        if self._seen.get((rank, what), (None, now))[0] != value:
            self._seen[rank, what] = value, now
        return now - self._seen[rank, what][1]

    def _condition(self, note: Note) -> Condition:
        letter = self._letter(note)
        if note.phase == "left":
            return "left"
        return "stopped" if letter in _STOPPED else "runs" if letter else "gone"

    def _letter(self, note: Note) -> str:
        """Return the letter of the rank's process; empty if it has ended, and another process perhaps has its number."""
        letter, started = _process(note.pid)
        return letter if letter not in _ENDED and self._started.setdefault(note.pid, started) == started else ""

    def _written(self, rank: int) -> str:
        with suppress(OSError):
            return stack_file(self._folder, rank).read_text(encoding="utf-8", errors="replace")
        return ""

    def _has_stacks(self, rank: int) -> bool:
        return "most recent call first" in self._written(rank)


class Watchdog:
    """The work of this process."""

    def __init__(self, watch: Watch):
        self._watch, self._clock, self._disk = watch, WatchedTime(), Disk()
        self._ranks = Ranks(Path(watch.folder), self._clock)
        nodes = watch.node, watch.num_nodes, watch.limits.silent_s
        self._exchange = Exchange(Path(watch.shared), *nodes, self._clock, self._disk, watch.exchange_s)
        self._kept = {path: _inode(path) for path in watch.remove}
        self._ended_job = False

    def run(self) -> None:
        """Watch until all ranks of this node have ended, or end them."""
        while not self._ranks.all_ended():
            time.sleep(_POLL_S)
            own = self._ranks.look()
            self._keep()
            if self._exchange.is_due and self._has_alarm(own):
                self._end_job(own)
                break
        self._clean_up()

    def _has_alarm(self, own: Sequence[RankState]) -> bool:
        """Tell the other nodes, and return True if the job hangs. In a job of one node this touches no disk."""
        self._exchange.tell(own)
        others = self._exchange.others()
        if self._exchange.leads and hangs(own + others, self._watch.limits):
            self._exchange.write("alarm", "")
            return True
        return self._watch.num_nodes > 1 and self._exchange.has("alarm")

    def _end_job(self, own: Sequence[RankState]) -> None:
        stacks = self._ranks.dump(own)
        self._ended_job = True
        self._exchange.write(f"stacks-{self._watch.node}.json", json.dumps(stacks))
        verdict = self._judge(own, stacks) if self._exchange.leads else self._told()
        self._disk.do(lambda: self._ranks.tell_torchrun(verdict))
        self._ranks.end(verdict.guilty, self._watch.limits)

    def _judge(self, own: Sequence[RankState], stacks: dict[int, str]) -> Verdict:
        """Print, write and return the verdict once the nodes have written their stacks, which they do after their last states."""
        files = [f"stacks-{node}.json" for node in range(self._watch.num_nodes)]
        if self._watch.num_nodes > 1:
            self._exchange.wait_for(*files, timeout_s=_ALL_STACKS_S)
        told = filter(None, self._exchange.read(*files))
        stacks = stacks | {int(rank): text for texts in told for rank, text in texts.items()}
        verdict = judge([*own, *self._exchange.others()], stacks)
        lines = "\n".join([*_described(stacks), verdict.message])
        self._disk.do(lambda: print(lines, file=sys.stderr, flush=True))  # whoever reads this may be gone
        self._exchange.write("verdict.json", json.dumps(verdict))
        if self._watch.requeue:
            requeue, text = Path(self._watch.requeue), json.dumps({"hang": verdict.message}) + "\n"
            self._disk.do(lambda: write_whole(requeue.with_name(f"{requeue.name}.partial"), requeue, text))
        return verdict

    def _told(self) -> Verdict:
        self._exchange.wait_for("verdict.json", timeout_s=2 * _ALL_STACKS_S)
        (verdict,) = self._exchange.read("verdict.json")
        return Verdict(*(verdict or ((), "hang: node 0 gives no verdict; its log may say more")))

    def _keep(self) -> None:
        """Remember which folders in memory are this attempt's: the next one may make them again under the same names."""
        self._kept = {path: _inode(path) or inode for path, inode in self._kept.items()}

    def _clean_up(self) -> None:
        self._exchange.tell(self._ranks.look())
        for path, inode in self._kept.items():
            if inode is not None and _inode(path) == inode:
                shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(self._watch.folder, ignore_errors=True)
        if self._watch.node == 0 and not self._ended_job:
            self._exchange.remove()


def _process(pid: int) -> tuple[str, str]:
    """Return the letter of the process's state, and when it began; empty if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def _signal(state: RankState, number: int) -> None:
    if state.condition in ("runs", "stopped", "left"):
        with suppress(ProcessLookupError):
            os.kill(state.pid, number)


def _py_spy(pid: int) -> str:
    """Return the stacks as py-spy reads them from outside; empty if it is not installed or may not."""
    with suppress(OSError, subprocess.SubprocessError):
        command = ["py-spy", "dump", "--pid", str(pid)]
        return subprocess.run(command, capture_output=True, text=True, timeout=_PY_SPY_S, check=True).stdout
    return ""


def _described(stacks: Mapping[int, str]) -> Iterable[str]:
    """Yield the stacks of the main threads; ranks with the same one share it."""
    ranks: dict[str, list[int]] = defaultdict(list)
    for rank, text in sorted(stacks.items()):
        ranks[main_thread(text)].append(rank)
    for text, same in ranks.items():
        yield f"stack of rank {', '.join(map(str, same))}, innermost call first:\n{text}"


def _wait(is_done: Callable[[], bool], timeout_s: float) -> bool:
    end = time.monotonic() + timeout_s
    while not (done := is_done()) and time.monotonic() < end:
        time.sleep(0.1)
    return done


def _inode(path: str) -> int | None:
    with suppress(OSError):
        return os.stat(path).st_ino
    return None


def main(argument: str) -> None:
    given = Watch(*json.loads(argument))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with the ranks, which may have much to do then
    Watchdog(given._replace(limits=Limits(*given.limits), remove=tuple(given.remove))).run()


if __name__ == "__main__":
    main(sys.argv[1])
