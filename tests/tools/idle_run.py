"""Stands for dapo_mcore.train in tests of Slurm jobs: the same files and signals, but no model and no start of a minute.

RUN/JOB.ATTEMPT/rank-N.json     what the rank was given
                saving          the run was told to stop, by RUN/stop or SIGTERM
                saved-N         SAVE_S later
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path


def given() -> dict[str, object]:
    return {
        "pid": os.getpid(),
        "environment": dict(os.environ),
        "cpus": len(os.sched_getaffinity(0)),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE),
    }


def main(name: str, rank: str) -> int:
    signals: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    run = Path("runs") / name
    folder = run / os.environ["ATTEMPT"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"partial-{rank}").write_text(json.dumps(given()))
    (folder / f"partial-{rank}").rename(folder / f"rank-{rank}.json")
    while not (signals or (folder / "saving").exists() or (rank == "0" and (run / "stop").exists())):
        time.sleep(0.1)
    (folder / "saving").touch()
    time.sleep(float(os.environ["SAVE_S"]))
    (folder / f"saved-{rank}").touch()
    if rank == "0" and not signals:
        (run / "requeue").write_text('{"step": 1}\n')
    return 128 + signals[0] if signals else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[-1].partition("name=")[2], os.environ["RANK"]))
