"""Program of test_faults.py: several runs one after the other in one process, since importing takes longer than a run.

    python -m tests.train.faulty_runs CONFIG OVERRIDES…     cases come as JSON on standard input

A case has `overrides`, and some of these:

    servers      {"1": […]}: faults of the next server that starts, ordered at the begin of rollout step 1; "0": before the run
    full_at      the step whose checkpoint meets a full disk
    copy_of      the run whose folder is this run's at the begin, without its last checkpoint
    damage       {"step_000003/manifest.json": 0}: files of checkpoints that are cut to so many bytes before the run
    only_fault   the fault of every reward that fails; "": each has its own
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

from dapo_mcore.actor.parallel import layout
from dapo_mcore.checkpoint.run_folder import latest_checkpoint
from dapo_mcore.checkpoint.saves import Saves
from dapo_mcore.controller import Controller
from dapo_mcore.train.__main__ import main

case: dict[str, Any] = {}


def prepare() -> None:
    os.environ["ONLY_FAULT"] = case.get("only_fault", "raise")
    folder = Path("runs") / case["name"]
    if original := case.get("copy_of"):
        shutil.copytree(f"runs/{original}", folder)
        shutil.rmtree(str(latest_checkpoint(folder)))
    for file, size in case.get("damage", {}).items():
        os.truncate(folder / "checkpoints" / file, size)
    order(0)


def order(step: int) -> None:
    """Let the next server that starts meet the step's faults."""
    if faults := case.get("servers", {}).get(str(step)):
        Path(os.environ["FAKE_FAULTS"]).write_text(json.dumps(faults))


def limit(process: int, num_bytes: int) -> None:
    """Let the process write no file beyond this size."""
    resource.prlimit(process, resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def install() -> None:
    """Let runs meet the faults of their case."""
    rollout, save = Controller.rollout, Saves.save

    def order_and_roll_out(self: Controller, step: int) -> Any:
        order(step)
        return rollout(self, step)

    def save_on_a_full_disk(self: Saves, actor: Any, state: Any, *, wait: bool = True) -> Path:
        if case.get("full_at") != state.step:
            return save(self, actor, state, wait=wait)
        self.finish()
        limit(self.pid or os.getpid(), 10_000)
        try:
            return save(self, actor, state, wait=wait)
        finally:
            limit(os.getpid(), resource.RLIM_INFINITY)

    Controller.rollout, Saves.save = order_and_roll_out, save_on_a_full_disk


if __name__ == "__main__":
    install()
    for case in json.load(sys.stdin):
        prepare()
        status = main([*sys.argv[1:], f"name={case['name']}", *case["overrides"]])
        layout.stop()
        print("ENDED", status, flush=True)
