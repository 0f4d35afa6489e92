"""A pool of reward processes. A worker that hangs or dies loses only its current attempt, and is replaced.

Change here: how workers are started, watched and killed. worker.py runs inside them.
Workers are plain subprocesses: multiprocessing children would import the trainer's main module again.
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
from dataclasses import asdict
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Any

from dapo_mcore.errors import RewardError
from dapo_mcore.process.plugin import plugin_environment
from dapo_mcore.reward.attempt import Attempt, Outcome
from dapo_mcore.reward.plugins import Rule
from dapo_mcore.reward.worker import LATE_EXIT_CODE

START_SECONDS = 180.0
"""Timeout for a worker's start: a user's function may import torch or sympy from a cold network disk."""
HOPELESS = 8
"""Number of attempts that may fail before any succeeds: a step has thousands, each with a timeout of 30 s."""


class RewardPool:
    """`num_workers` reward processes. Raises RewardError at once if the function cannot be loaded.

    Raises RewardError also if the first HOPELESS attempts all hang or end their process.
    """

    def __init__(self, num_workers: int, rule: Rule, timeout_seconds: float):
        self._timeout_seconds = timeout_seconds
        self._arguments = {"rule": asdict(rule), "timeout_seconds": timeout_seconds}
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
        """Return one outcome per attempt, in order. An attempt's timeout starts when a worker gets it.

        Raise RewardError if a worker cannot be replaced. An interrupted call closes the pool.
        """
        assert self._workers, "the pool is closed"
        try:
            outcomes = self._outcomes(attempts)
        except BaseException:
            self.close()  # the next call must not get the outcomes of this call's attempts
            raise
        return [outcomes[index] for index in range(len(attempts))]

    def close(self) -> None:
        """End every worker. May be called twice."""
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
        except OSError:  # it died while idle, so this attempt is not the cause
            self._replace(worker)
        else:
            waiting.popleft()

    def _listen(self, outcomes: dict[int, Outcome]) -> None:
        """Wait for the next message or deadline, then handle all that have come."""
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
                f"a reward process for {self._arguments['rule']['function']!r} did not start: {failure} "
                f"(timeout {START_SECONDS:.0f} s); its output is above"
            )
        assert worker.index is not None
        outcomes[worker.index] = Outcome(failure=failure)
        self._num_lost += 1
        if self._num_lost >= HOPELESS and not self._has_answered:
            raise RewardError(
                f"reward.function {self._arguments['rule']['function']!r} has answered none of its first {self._num_lost} samples "
                f"(the last: {failure}; reward.timeout_seconds is {self._timeout_seconds:g}); try it on one response with "
                f"dapo-mcore reward-explain"
            )
        self._replace(worker)

    def _replace(self, worker: _Worker) -> None:
        worker.kill()
        self._workers[self._workers.index(worker)] = _Worker(self._arguments)


class _Worker:
    """One process and our end of its pipe. `index` is its current attempt; idle means ready and without an attempt."""

    def __init__(self, arguments: dict[str, Any]):
        self.connection, theirs = Pipe(duplex=True)
        self.index: int | None = None
        self.ready = False
        self.deadline = time.monotonic() + START_SECONDS
        with theirs:  # closed here, so that the pipe closes when the process ends
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dapo_mcore.reward.worker", str(theirs.fileno()), json.dumps(arguments)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=plugin_environment(),
                start_new_session=True,  # a signal to the group ends its children too; Ctrl-C does not reach it
            )

    @property
    def idle(self) -> bool:
        return self.ready and self.index is None

    def submit(self, index: int, attempt: Attempt, timeout_seconds: float) -> None:
        """Send the attempt to the process. Raise OSError if the process has ended."""
        self.connection.send(attempt)
        self.index = index
        self.deadline = time.monotonic() + timeout_seconds

    def ending(self) -> str:
        """Return why the pipe has closed. A late worker ends itself if this process is delayed beyond its grace period."""
        code = None  # if the process still runs without its pipe
        with suppress(subprocess.TimeoutExpired):
            code = self._process.wait(timeout=1.0)
        if code == LATE_EXIT_CODE and time.monotonic() >= self.deadline:
            return "timeout"
        return f"exit: the reward process ended with code {code}"

    def kill(self) -> None:
        self.connection.close()
        with suppress(ProcessLookupError):  # it has already ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
