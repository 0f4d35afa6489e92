"""The rank of a job that failed first, and why: `python -m dapo_mcore.process.failures LOGS`.

    LOGS/NODE/torchrun.log        what torchrun of this node wrote; it knows the ranks that a signal has ended. If it did not end
                                  with 0 itself, tools/slurm/node.sh adds its status
             …/RANK/error.json    what a rank has told before it ended (exit_status.py)

Change here: which of several failures is called the cause.
"""

from __future__ import annotations

import json
import math
import re
import signal
import sys
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

_KILLED = re.compile(
    r" time +: (\S+)\n.* host .*\n.* rank +: (\d+) .*\n.* exitcode +: -(\d+) .*\n.* error_file: <N/A>\n.* traceback : (.*)"
)
"""A rank in torchrun's report that has left no message: time, rank, signal, torchrun's words."""

_ENDED = re.compile(r"(.*)\n?^torchrun ended with status (\d+)$", re.MULTILINE)
"""What node.sh adds to torchrun's log, after the last line of torchrun's own."""


class Failure(NamedTuple):
    """The end of one rank, or with rank "" of a node's torchrun. Sorted, the cause comes first: times are whole seconds, so a
    consequence may seem as old."""

    is_consequence: bool
    time: float
    node: str
    rank: str
    message: str

    def __str__(self) -> str:
        return f"node {self.node}{self.rank and f', rank {self.rank}'}: {self.message}"


def find_failures(logs: Path) -> list[Failure]:
    """Return the failures of all ranks and nodes, the cause first; of a node that torchrun has started again, those of its last attempt."""
    told = [_told(file, logs) for file in _of_last_attempts(logs.glob("*/**/error.json"))]
    return sorted([failure for failure in told if failure] + [*_killed(logs)])


def _of_last_attempts(files: Iterable[Path]) -> Iterator[Path]:
    """Yield RUN/attempt_N/RANK/error.json of the greatest N of each RUN."""
    attempts = {file: _attempt(file.parents[1].name) for file in files}
    last: dict[Path, int] = {}
    for file, number in attempts.items():
        last[file.parents[2]] = max(number, last.get(file.parents[2], 0))
    return (file for file, number in attempts.items() if number == last[file.parents[2]])


def _attempt(folder: str) -> int:
    number = folder.removeprefix("attempt_")
    return int(number) if number.isdecimal() else 0


def _told(file: Path, logs: Path) -> Failure | None:
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["message"]
        info, node = record["extraInfo"], file.relative_to(logs).parts[0]
        return Failure(
            bool(info.get("is_consequence")), float(info["timestamp"]), node, str(info.get("rank")), record["message"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None  # cut off where its rank was killed


def _killed(logs: Path) -> Iterator[Failure]:
    for file in logs.glob("*/torchrun.log"):
        text = file.read_text(encoding="utf-8", errors="replace")
        for time, rank, number, words in _KILLED.findall(text):
            # torchrun ends the other ranks of a node by SIGTERM when one has failed
            is_consequence = int(number) == signal.SIGTERM
            yield Failure(is_consequence, datetime.fromisoformat(time).timestamp(), file.parent.name, rank, words)
        if ended := _ENDED.search(text):
            yield _torchrun(file, int(ended[2]), ended[1])


def _torchrun(log: Path, status: int, last_line: str) -> Failure:
    """Return the end of a node's torchrun: the cause if a signal has ended it, else the last to be told, after all ranks."""
    node = log.parent.name
    if status > 128:  # as shells say it
        words = f"torchrun was ended by {signal.Signals(status - 128).name}"
        return Failure(False, log.stat().st_mtime, node, "", words)
    return Failure(True, math.inf, node, "", f"torchrun ended with status {status}: {last_line}")


def main(logs: str) -> int:
    """Print the first failure. Return 1 if there is none."""
    found = find_failures(Path(logs))
    print(f"failed first: {found[0]}" if found else "neither a rank nor a torchrun has said why it ended")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
