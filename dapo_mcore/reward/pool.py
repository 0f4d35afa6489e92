"""A pool of reward processes: a worker that hangs or dies costs the one attempt it was on, and is replaced.

Change here: how workers are started, watched and killed. What they do is in worker.py.
Workers are plain subprocesses, not multiprocessing children: those would import the trainer's main module again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Any

from dapo_mcore.errors import RewardError
from dapo_mcore.process.ray_cluster import without_ray
from dapo_mcore.reward.attempt import Attempt, Outcome
from dapo_mcore.reward.worker import LATE_EXIT_CODE

START_SECONDS = 180.0
"""Of a worker to be ready: importing a plug-in may pull in torch or sympy from a cold network disk."""
HOPELESS = 8
"""Attempts that may be lost before the first one comes back: a step has thousands, each with a deadline of 30 s."""


class RewardPool:
    """`num_workers` processes. Raises RewardError at once when the function cannot be loaded.

    So it does where the first HOPELESS attempts all hang, or all end their process.
    """

    def __init__(self, num_workers: int, function: str, adapter: str, strict_box: bool, timeout_seconds: float):
        self._timeout_seconds = timeout_seconds
        self._arguments = {
            "function": function,
            "adapter": adapter,
            "strict_box": strict_box,
            "timeout_seconds": timeout_seconds,
        }
        self._workers: list[_Worker] = []
        self._num_lost, self._has_answered = 0, False
        try:
            for _ in range(num_workers):
                self._workers.append(_Worker(self._arguments))
            while not all(worker.ready for worker in self._workers):
                self._listen(outcomes={})
        except BaseException:
            self.close()
            raise

    def score(self, attempts: Sequence[Attempt]) -> list[Outcome]:
        """One outcome an attempt, in order. The clock of an attempt starts when a worker gets it.

        Raises RewardError when a worker cannot be replaced. An interrupted call closes the pool.
        """
        assert self._workers, "the pool is closed"
        try:
            outcomes = self._outcomes(attempts)
        except BaseException:
            self.close()  # workers still hold attempts of this call, whose outcomes the next call must not see
            raise
        return [outcomes[index] for index in range(len(attempts))]

    def close(self) -> None:
        """Ends every worker. May be called twice."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def _outcomes(self, attempts: Sequence[Attempt]) -> dict[int, Outcome]:
        waiting = deque(range(len(attempts)))
        outcomes: dict[int, Outcome] = {}
        while len(outcomes) < len(attempts):
            for worker in self._workers:
                if waiting and worker.idle:
                    self._give(worker, waiting, attempts)
            self._listen(outcomes)
        return outcomes

    def _give(self, worker: _Worker, waiting: deque[int], attempts: Sequence[Attempt]) -> None:
        try:
            worker.submit(waiting[0], attempts[waiting[0]], self._timeout_seconds)
        except OSError:  # it died while idle, which is no fault of this attempt
            self._replace(worker)
        else:
            waiting.popleft()

    def _listen(self, outcomes: dict[int, Outcome]) -> None:
        """Waits for the next message or deadline and takes everything that is due."""
        by_connection = {worker.connection: worker for worker in self._workers if not worker.idle}
        next_deadline = min(worker.deadline for worker in by_connection.values())
        for connection in wait(list(by_connection), timeout=max(0.0, next_deadline - time.monotonic())):
            self._receive(by_connection.pop(connection), outcomes)
        for worker in by_connection.values():
            if time.monotonic() >= worker.deadline:
                self._fail(worker, "timeout", outcomes)

    def _receive(self, worker: _Worker, outcomes: dict[int, Outcome]) -> None:
        try:
            message = json.loads(worker.connection.recv_bytes())
        except (EOFError, OSError):
            self._fail(worker, worker.ending(), outcomes)
            return
        if "error" in message:
            raise RewardError(message["error"])
        if worker.index is None:
            worker.ready = True
        else:
            outcomes[worker.index] = Outcome(**message)
            worker.index = None
            self._has_answered = True

    def _fail(self, worker: _Worker, failure: str, outcomes: dict[int, Outcome]) -> None:
        if not worker.ready:
            raise RewardError(
                f"a reward process for {self._arguments['function']!r} did not start: {failure} "
                f"(it has {START_SECONDS:.0f} s); what it printed is above"
            )
        assert worker.index is not None
        outcomes[worker.index] = Outcome(failure=failure)
        self._num_lost += 1
        if self._num_lost >= HOPELESS and not self._has_answered:
            raise RewardError(
                f"reward.function {self._arguments['function']!r} has answered none of its first {self._num_lost} samples "
                f"(the last: {failure}; reward.timeout_seconds is {self._timeout_seconds:g}); try it on one response with "
                f"dapo-mcore reward-explain"
            )
        self._replace(worker)

    def _replace(self, worker: _Worker) -> None:
        worker.kill()
        self._workers[self._workers.index(worker)] = _Worker(self._arguments)


class _Worker:
    """One process and our end of its pipe. `index` is the attempt it is on; idle means ready and on none."""

    def __init__(self, arguments: dict[str, Any]):
        self.connection, theirs = Pipe(duplex=True)
        self.index: int | None = None
        self.ready = False
        self.deadline = time.monotonic() + START_SECONDS
        with theirs:  # closed here, so that the pipe ends when the process does
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dapo_mcore.reward.worker", str(theirs.fileno()), json.dumps(arguments)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=_environment(),
                start_new_session=True,  # one signal reaches the processes it may have started; Ctrl-C does not
            )

    @property
    def idle(self) -> bool:
        return self.ready and self.index is None

    def submit(self, index: int, attempt: Attempt, timeout_seconds: float) -> None:
        """Raises OSError when the process is gone."""
        self.connection.send(attempt)
        self.index = index
        self.deadline = time.monotonic() + timeout_seconds

    def ending(self) -> str:
        """Why the pipe has ended. A late worker ends itself where we are held up for longer than its grace."""
        code = None  # of a process that lives on without its pipe
        with suppress(subprocess.TimeoutExpired):
            code = self._process.wait(timeout=1.0)
        if code == LATE_EXIT_CODE and time.monotonic() >= self.deadline:
            return "timeout"
        return f"exit: the reward process ended with code {code}"

    def kill(self) -> None:
        self.connection.close()
        with suppress(ProcessLookupError):  # it has ended and been waited for
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _environment() -> dict[str, str]:
    """Ours, with our import path and one thread a worker: n workers with all cores each would fight.

    Without the token of a Ray cluster: reward functions read what a model has written.
    """
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    return {"OMP_NUM_THREADS": "1", **without_ray(dict(os.environ)), "PYTHONPATH": path}
