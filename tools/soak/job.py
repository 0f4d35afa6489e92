"""A run under torchrun, and what can be seen of it from outside: its steps, its ranks' phases, its processes, its words.

Change here: the task, and how the run is started. A batch system sees no more of a run than this file.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from dapo_mcore.checkpoint.run_folder import all_checkpoints, step_of
from dapo_mcore.process.beacon import BeaconReader, Note

ROOT = Path(__file__).resolve().parents[2]
NAME = "soak"
MARK = "DAPO_MCORE_SOAK"
"""Every process of a soak inherits this variable with the soak's own number."""
TASK = (
    "rollout.group_size=8",
    "rollout.max_response_tokens=12",
    "reward.overlong.cache=4",
    "sampling.style=none",
    "sampling.train_batch_prompts=16",
    "sampling.gen_batch_prompts=16",
    "batch.mini_batch_prompts=4",
    "warm_start.max_updates=4",
    "warm_start.check_every=4",
    "warm_start.batch_size=32",
    "warm_start.choose.limit=8",
    "eval.every=4",
    "eval.samples_per_prompt=2",
    "eval.sets.heldout.limit=8",
    "checkpoint.every=2",
    "checkpoint.async_save=true",
    "checkpoint.keep=3",
    "observe.samples_per_step=128",
    "observe.tensorboard=false",
    "observe.plot_at_end=false",
    "parallel.tensor_parallel=1",
    "parallel.hang_minutes=1",
)
"""The quickstart's task in seconds. All samples of a step are written, so that they can be compared."""
_DYING_S = 0.02
_TELLING = (
    r"^hang: .*",
    r"^error: .*",
    r"^stopped by .*",
    r"torchrun is gone.*",
    r"^warning: .*",
    r"^\[rank\d+\]: \w*Error.*",
)


class Setup(NamedTuple):
    """What all runs of a soak have in common."""

    config: Path
    overrides: tuple[str, ...]
    num_ranks: int
    num_steps: int
    work: Path
    mark: str

    @property
    def temporary(self) -> Path:
        return self.work / "tmp"

    def command(self, output_dir: Path, max_restarts: int) -> list[str]:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        torchrun += ["--nproc-per-node", str(self.num_ranks), "--max-restarts", str(max_restarts)]
        torchrun += ["--log-dir", str(self.work / "torchrun")]
        own = [f"name={NAME}", f"output_dir={output_dir}", f"num_rollout_steps={self.num_steps}"]
        return [sys.executable, *torchrun, "-m", "dapo_mcore.train", str(self.config), *TASK, *self.overrides, *own]

    def environment(self) -> dict[str, str]:
        own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "500", MARK: self.mark}
        caches = {"TMPDIR": str(self.temporary), "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor")}
        return {**os.environ, **own, **caches}


class View(NamedTuple):
    """What is seen of a run at one moment.

    step     the last rollout step in metrics.jsonl; 0 before the first one.
    pids, phases   by rank, of those that have begun.
    """

    step: int
    pids: dict[int, int]
    phases: dict[int, str]
    is_saving: bool


class Job:
    """One start of a run, in the folder output_dir/soak."""

    def __init__(self, setup: Setup, output_dir: Path, log: Path, max_restarts: int = 0):
        self.run_dir, self._setup, self._log = output_dir / NAME, setup, log
        self._log_begin = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                setup.command(output_dir, max_restarts),
                cwd=setup.work,
                env=setup.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._readers: dict[Path, BeaconReader] = {}
        self._rows = (-1, 0)

    @property
    def status(self) -> int | None:
        """The exit status of torchrun; None while it runs."""
        return self.process.poll()

    def has_ended(self) -> bool:
        """Return True once torchrun and all ranks have ended, so that the run may start again."""
        return self.status is not None and not self.view().pids

    def is_finished(self) -> bool:
        """Return True if the run has ended with its last step done."""
        return self.status == 0 and self.has_ended() and (self.run_dir / "hf/final/model.safetensors").exists()

    def view(self) -> View:
        """Return what is seen now. Cheap enough for hundreds of looks a second."""
        notes = self._notes()
        pids, phases = {note.rank: note.pid for note in notes}, {note.rank: note.phase for note in notes}
        return View(self.last_step(), pids, phases, any(self.partials()))

    def partials(self) -> Iterator[Path]:
        return (self.run_dir / "checkpoints").glob("*.partial")

    def last_step(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        with suppress(OSError, ValueError, KeyError):
            size = path.stat().st_size
            if size != self._rows[0]:
                lines = path.read_bytes().split(b"\n")
                self._rows = size, json.loads(lines[-2])["step"] if len(lines) > 1 else 0
        return self._rows[1]

    def saved_step(self) -> int:
        return max((step_of(path) for path in all_checkpoints(self.run_dir)), default=-1)

    def saver(self, rank: int) -> int | None:
        """Return the process that writes the rank's checkpoints, None if there is none."""
        with suppress(OSError, KeyError):
            pid = self.view().pids[rank]
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                if b"dapo_mcore.checkpoint.saver" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return int(child)
        return None

    def words(self, begin: int | None = None) -> str:
        """Return the telling line of what the run has written since byte `begin` of its log, else since its start."""
        with self._log.open("rb") as file:
            file.seek(self._log_begin if begin is None else begin)
            text = file.read().decode(errors="replace")
        for pattern in _TELLING:
            if found := re.search(pattern, text, re.MULTILINE):
                return found[0].strip()
        return ""

    def log_end(self) -> int:
        return self._log.stat().st_size

    def _notes(self) -> list[Note]:
        """Return the beacons of the ranks that are alive. Each attempt of torchrun has a folder of its own."""
        for folder in self._setup.temporary.glob("dapo_mcore-*"):
            if folder not in self._readers:
                self._readers[folder] = BeaconReader(folder)
        notes = [note for reader in self._readers.values() for note in reader.read()]
        return [note for note in notes if is_alive(note.pid) and note.phase != "left"]


def is_alive(pid: int) -> bool:
    """Return True if the process exists, and not only waits for its parent to notice its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def family(mark: str) -> list[psutil.Process]:
    """Return all processes with this mark but the caller, also those whose parents are gone."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            is_own = process.environ().get(MARK) == mark and process.pid != os.getpid()
            if is_own and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def kill_family(mark: str) -> None:
    """Kill every process with this mark at once, as if the machine died."""
    while found := family(mark):  # one may start another meanwhile
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(_DYING_S)  # psutil's own waiting would take torchrun's exit status
