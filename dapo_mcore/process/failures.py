"""The rank of a job that failed first, and why: `python -m dapo_mcore.process.failures LOGS`.

    LOGS/NODE/torchrun.log        what torchrun of this node wrote; it knows the ranks that a signal has ended
             …/RANK/error.json    what a rank has told before it ended (exit_status.py)

Change here: which of several failures is called the cause.
"""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

_KILLED = re.compile(
    r" time +: (\S+)\n.* host .*\n.* rank +: (\d+) .*\n.* exitcode +: -(\d+) .*\n.* error_file: <N/A>\n.* traceback : (.*)"
)
"""A rank in torchrun's report that has left no message: time, rank, signal, torchrun's words."""


class Failure(NamedTuple):
    """The end of one rank. Sorted, the cause comes first: times are whole seconds, so a consequence may seem as old."""

    is_consequence: bool
    time: float
    node: str
    rank: str
    message: str

    def __str__(self) -> str:
        return f"node {self.node}, rank {self.rank}: {self.message}"


def find_failures(logs: Path) -> list[Failure]:
    """Return the failures of all ranks, the cause first."""
    told = [_told(file, logs) for file in logs.glob("*/**/error.json")]
    return sorted([failure for failure in told if failure] + [*_killed(logs)])


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
        for time, rank, number, words in _KILLED.findall(file.read_text(encoding="utf-8", errors="replace")):
            # torchrun ends the other ranks of a node by SIGTERM when one has failed
            is_consequence = int(number) == signal.SIGTERM
            yield Failure(is_consequence, datetime.fromisoformat(time).timestamp(), file.parent.name, rank, words)


def main(logs: str) -> int:
    """Print the first failure. Return 1 if no rank has told one."""
    found = find_failures(Path(logs))
    print(f"failed first: {found[0]}" if found else "no rank has said why it ended")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
