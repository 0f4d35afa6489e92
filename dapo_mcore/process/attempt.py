"""One attempt of a job: its processes find each other in a store that dead attempts have used, and useless attempts end.

Change here: how an attempt gets its name, and when a job is not started again.

torchrun starts ranks again after a failure (--max-restarts), often with the same store, where the addresses of the dead ranks
still are. Its restart count is no name for an attempt: each node counts its own failures. So the ranks call the roll.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from dapo_mcore.errors import OtherRankFailed, RestartError
from dapo_mcore.process.failures import find_failures

_POLL_S = 0.1
_PER_RANK_S = 0.0005
"""All ranks ask the same store, which answers about 4,000 questions a second then."""
_STARTS = "starts"
_MAX_STARTS = 2


class Store(Protocol):
    """What the roll call needs of torch's stores."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


def call_roll(store: Store, rank: int, size: int, timeout_s: float) -> str:
    """Return a name for this attempt, the same on all of its ranks and new in the store. Raise OtherRankFailed, with the missing
    ranks, if not all are there within the time.

    Every rank writes a number that nobody had before. Rank 0 answers each number with the name, and the rank confirms the name;
    once all have, rank 0 says so. What dead ranks have written is therefore replaced, or never confirmed. If rank 0 dies meanwhile,
    the others take the name that its successor gives them.
    """
    if rank == 0:
        return _lead(store, secrets.token_hex(8), size, timeout_s)
    deadline = time.monotonic() + timeout_s
    number, confirmed = secrets.token_hex(8), ""
    store.set(f"roll/{rank}", number)
    while time.monotonic() < deadline:
        answered, _, name = (_read(store, f"roll/{rank}/answer") or "").partition(" ")
        if answered == number and name != confirmed:
            store.set(f"roll/{name}/{rank}", number)
            confirmed = name
        if confirmed and store.check([f"roll/{confirmed}/complete"]):
            return confirmed
        time.sleep(_pause_s(size))
    raise OtherRankFailed(
        f"the {size} ranks of this job have not found each other within {timeout_s:g} s; rank 0 names those that are missing"
    )


def _lead(store: Store, name: str, size: int, timeout_s: float) -> str:
    deadline = time.monotonic() + timeout_s
    others, answered = range(1, size), {}
    absent = list(others)
    while absent:
        for rank in others:
            number = _read(store, f"roll/{rank}")
            if number is not None and number != answered.get(rank):
                store.set(f"roll/{rank}/answer", f"{number} {name}")
                answered[rank] = number
        absent = [rank for rank in others if _read(store, f"roll/{name}/{rank}") != answered.get(rank, "")]
        if absent and time.monotonic() > deadline:
            ranks = ", ".join(map(str, absent[:8])) + (f" and {len(absent) - 8} more" if len(absent) > 8 else "")
            raise OtherRankFailed(
                f"{len(absent)} of {size} ranks have not joined the job within {timeout_s:g} s: {ranks}; their logs say why"
            )
        if absent:
            time.sleep(_pause_s(size))
    store.set(f"roll/{name}/complete", "")
    return name


def _pause_s(size: int) -> float:
    return max(_POLL_S, size * _PER_RANK_S)


def _read(store: Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None


def check_progress(environment: Mapping[str, str], checkpoint: str) -> None:
    """Rank 0: raise RestartError if torchrun has started this job twice from `checkpoint` already, and both have failed.

    checkpoint  where this start goes on from; any text for a start from nothing.
    torchrun keeps the logs of all starts in one folder, and their origins are noted there.
    """
    error_file = environment.get("TORCHELASTIC_ERROR_FILE", os.devnull)
    if error_file == os.devnull or environment.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return
    attempt = Path(error_file).parents[1]  # LOGS/attempt_0/RANK/error.json
    notes = attempt.parent / _STARTS
    starts = notes.read_text(encoding="utf-8").splitlines() if notes.exists() else []
    if starts.count(checkpoint) >= _MAX_STARTS:
        raise RestartError(
            f"{_MAX_STARTS} starts from {checkpoint} have failed, so there is no third one; "
            f"{_last_failure(attempt.parent)}. Mend that, then give the command again; checkpoint.every must be shorter than the "
            f"time between failures"
        )
    notes.write_text("\n".join([*starts, checkpoint, ""]), encoding="utf-8")


def _last_failure(attempts: Path) -> str:
    """Return why the last attempt that was not refused has failed: torchrun may also start refused ones again."""
    numbers = sorted((int(path.name.removeprefix("attempt_")) for path in attempts.glob("attempt_*")), reverse=True)
    for number in numbers:
        for failure in find_failures(attempts / f"attempt_{number}"):
            if "so there is no third one" not in failure.message:
                return f"the last: rank {failure.rank}: {failure.message}"
    return "see the messages above"
