"""How each kind of event is done to a running job.

Change here: what an event does. A strike is a generator: it does its harm, is resumed many times a second while it lasts, and undoes
what has to be undone at its end, or when the job ends first.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from pathlib import Path
from shutil import rmtree

from dapo_mcore.checkpoint.run_folder import all_checkpoints
from tools.soak import arena
from tools.soak.events import Event
from tools.soak.job import Job, family, kill_family

Strike = Generator[None, None, None]
_FREEZE_S = (0.5, 4.0)
_SECOND_SIGNAL_S = (0.1, 3.0)
_RETOUCH_S = 1.0
_FULL_STEPS = 3
"""Rollout steps for which the disk stays full: at least one of them saves."""


class LeftOut(Exception):
    """The event cannot be done, for this reason."""


def strike(event: Event, job: Job, disk: Path, mark: str) -> Strike:
    """Return the strike of the event. Its first `next` does it; raise LeftOut there if it cannot be done."""
    return _STRIKES[event.kind](event, job, disk, mark)


def _kill_rank(event: Event, job: Job, *_: object) -> Strike:
    os.kill(_rank(event, job), signal.SIGKILL)
    yield


def _kill_torchrun(_: Event, job: Job, *__: object) -> Strike:
    job.process.kill()
    yield


def _kill_all(_: Event, job: Job, __: Path, mark: str) -> Strike:
    kill_family(mark)
    yield


def _kill_saver(event: Event, job: Job, *_: object) -> Strike:
    os.kill(_saver(event, job), signal.SIGKILL)
    yield


def _kill_server(event: Event, job: Job, _: Path, mark: str) -> Strike:
    servers = [process for process in family(mark) if f"{job.run_dir}/servers/" in " ".join(process.cmdline())]
    if not servers:
        raise LeftOut("no server runs")
    servers[int(event.luck * len(servers))].kill()
    yield


def _term(_: Event, job: Job, *__: object) -> Strike:
    job.process.terminate()
    yield


def _term_twice(event: Event, job: Job, *_: object) -> Strike:
    job.process.terminate()
    yield from _seconds(_between(_SECOND_SIGNAL_S, event.luck))
    job.process.terminate()


def _stop_file(_: Event, job: Job, *__: object) -> Strike:
    """Make the file again and again, as a batch script does: one made during the start may be removed as an old one."""
    while True:
        (job.run_dir / "stop").touch()
        yield from _seconds(_RETOUCH_S)


def _freeze(event: Event, job: Job, *_: object) -> Strike:
    yield from _stopped(_rank(event, job), _between(_FREEZE_S, event.luck))


def _freeze_saver(event: Event, job: Job, *_: object) -> Strike:
    yield from _stopped(_saver(event, job), _between(_FREEZE_S, event.luck))


def _freeze_for_good(event: Event, job: Job, *_: object) -> Strike:
    os.kill(_rank(event, job), signal.SIGSTOP)
    yield


def _disk_full(event: Event, job: Job, disk: Path, _: str) -> Strike:
    """Leave half a checkpoint of room until a save has failed, so that the other files of the run still find a place."""
    checkpoints = all_checkpoints(job.run_dir)
    if not checkpoints:
        raise LeftOut("there is no checkpoint yet, whose size would be known")
    begin, step = job.log_end(), job.last_step()
    arena.fill(disk, _size(checkpoints[-1]) // 2)
    try:
        while "space" not in job.words(begin) and job.last_step() < step + _FULL_STEPS:
            yield
    finally:
        arena.free(disk)


def _delete_partial(_: Event, job: Job, *__: object) -> Strike:
    partials = list(job.partials())
    if not partials:
        raise LeftOut("no save is in flight")
    for path in partials:
        rmtree(path, ignore_errors=True)
    yield


def _flip_byte(event: Event, job: Job, _: Path, mark: str) -> Strike:
    """Change one bit of one file of the newest checkpoint, once nobody writes there."""
    kill_family(mark)
    checkpoints = all_checkpoints(job.run_dir)
    if len(checkpoints) < 2:
        raise LeftOut("fewer than two checkpoints: the run was killed, and no bit flipped")
    flip_bit(checkpoints[-1], event.luck)
    yield


def flip_bit(checkpoint: Path, luck: float) -> Path:
    """Flip a bit of a checkpoint, chosen by a number in [0, 1) among all bytes of all its files. Return the file."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)
    place = luck * len(files)
    path = files[int(place)]
    content = bytearray(path.read_bytes())
    content[int(place % 1 * len(content))] ^= 1 << int(luck * 1000) % 8
    path.write_bytes(content)
    return path


_STRIKES: Mapping[str, Callable[[Event, Job, Path, str], Strike]] = {
    "kill-rank": _kill_rank,
    "kill-torchrun": _kill_torchrun,
    "kill-all": _kill_all,
    "kill-saver": _kill_saver,
    "kill-server": _kill_server,
    "term": _term,
    "term-twice": _term_twice,
    "stop-file": _stop_file,
    "freeze": _freeze,
    "freeze-saver": _freeze_saver,
    "freeze-for-good": _freeze_for_good,
    "disk-full": _disk_full,
    "delete-partial": _delete_partial,
    "flip-byte": _flip_byte,
}


def _rank(event: Event, job: Job) -> int:
    pid = job.view().pids.get(event.rank)
    if pid is None:
        raise LeftOut(f"rank {event.rank} is not there")
    return pid


def _saver(event: Event, job: Job) -> int:
    pid = job.saver(event.rank)
    if pid is None:
        raise LeftOut(f"rank {event.rank} has no process that saves")
    return pid


def _stopped(pid: int, seconds: float) -> Strike:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield from _seconds(seconds)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _seconds(count: float) -> Strike:
    end = time.monotonic() + count
    while time.monotonic() < end:
        yield


def _between(limits: tuple[float, float], luck: float) -> float:
    return limits[0] + luck * (limits[1] - limits[0])


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
