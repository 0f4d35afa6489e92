"""A reward pool on the nodes of a Ray cluster: one actor per worker, each with a RewardPool of one process.

Change here: how attempts are spread over nodes, and what happens when a node is lost. The RewardPool on the actor's node
handles timeouts and attempts that kill their process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from dapo_mcore.errors import ConfigError, RewardError
from dapo_mcore.process.ray_cluster import connect
from dapo_mcore.reward.attempt import Attempt, Outcome
from dapo_mcore.reward.plugins import Rule
from dapo_mcore.reward.pool import START_SECONDS, RewardPool

_LARGEST_CHUNK = 16
_CHUNKS_A_WORKER = 4
MOST_LOSSES = 3
"""Number of lost nodes after which the attempts they worked on count as failed, or a worker's start fails the run."""


class _Job(NamedTuple):
    """A worker's current attempts by index; none while it starts. `losses` nodes were lost during this job."""

    worker: int
    indices: tuple[int, ...] = ()
    losses: int = 0


class RayRewardPool:
    """`num_workers` workers on the cluster, with the interface of RewardPool.

    Raises RewardError if the function cannot be loaded on a node, ConfigError if the cluster has too few CPUs.
    """

    def __init__(
        self,
        num_workers: int,
        rule: Rule,
        timeout_seconds: float,
        ray_address: str | None,
    ):
        self._arguments = (rule, timeout_seconds)
        self._timeout_seconds = timeout_seconds
        self._actors: list[Any] = []
        self._disconnect = connect(ray_address)
        try:
            _check_room(num_workers)
            self._starting = {self._start(number): _Job(number) for number in range(num_workers)}
            while self._starting:
                self._finish(self._starting, deque(), {})
        except BaseException:
            self.close()
            raise

    @property
    def actors(self) -> tuple[Any, ...]:
        """The Ray actor of each worker. A lost one is replaced."""
        return tuple(self._actors)

    def score(self, attempts: Sequence[Attempt]) -> list[Outcome]:
        """Return one outcome per attempt, in order. Raise RewardError if there is no worker. An interrupted call closes."""
        assert self._actors, "the pool is closed"
        try:
            outcomes = self._outcomes(attempts)
        except BaseException:
            self.close()
            raise
        return [outcomes[index] for index in range(len(attempts))]

    def close(self) -> None:
        """End the actors and their processes. May be called twice."""
        import ray

        if ray.is_initialized():
            for actor in self._actors:
                ray.kill(actor)
        self._actors = []
        self._disconnect()

    def _start(self, number: int) -> Any:
        """Start worker `number` on a node. Return a Ray reference that is ready when the worker is."""
        import ray

        actor = ray.remote(RewardHost).options(num_cpus=1, scheduling_strategy="SPREAD", max_restarts=0)
        self._actors[number : number + 1] = [actor.remote(*self._arguments)]
        return self._actors[number].start.remote()

    def _outcomes(self, attempts: Sequence[Attempt]) -> dict[int, Outcome]:
        size = min(_LARGEST_CHUNK, -(-len(attempts) // (_CHUNKS_A_WORKER * len(self._actors))))
        indices = range(len(attempts))
        waiting = deque(_Job(-1, tuple(indices[start : start + size])) for start in range(0, len(attempts), size or 1))
        outcomes: dict[int, Outcome] = {}
        running = self._starting  # workers that restart after a lost node
        while len(outcomes) < len(attempts):
            busy = {job.worker for job in running.values()}
            for worker in set(range(len(self._actors))) - busy:
                if waiting:
                    job = waiting.popleft()._replace(worker=worker)
                    ref = self._actors[worker].score.remote([attempts[index] for index in job.indices])
                    running[ref] = job
            self._finish(running, waiting, outcomes)
        return outcomes

    def _finish(self, running: dict[Any, _Job], waiting: deque[_Job], outcomes: dict[int, Outcome]) -> None:
        """Wait for the next finished job and take its outcomes. Jobs of a lost node go to the other workers."""
        import ray

        longest_s = START_SECONDS + _LARGEST_CHUNK * self._timeout_seconds
        done, _ = ray.wait(list(running), timeout=longest_s)
        if not done:
            raise RewardError(f"no reward worker on the Ray cluster answered within {longest_s:.0f} s; are nodes lost?")
        job = running.pop(done[0])
        try:
            outcomes.update(zip(job.indices, ray.get(done[0])))
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, RewardError) else RewardError(str(error))) from error
        except ray.exceptions.RayActorError as error:
            self._replace(job._replace(losses=job.losses + 1), str(error), running, waiting, outcomes)

    def _replace(
        self, job: _Job, problem: str, running: dict[Any, _Job], waiting: deque[_Job], outcomes: dict[int, Outcome]
    ) -> None:
        """Start a new actor for one that was lost during `job`."""
        spent = job.losses >= MOST_LOSSES
        if spent and not job.indices:
            raise RewardError(f"reward worker {job.worker} was lost {MOST_LOSSES} times while it started: {problem}")
        running[self._start(job.worker)] = _Job(job.worker, losses=0 if job.indices else job.losses)
        if spent:
            outcomes.update({index: Outcome(failure=f"exit: lost with {MOST_LOSSES} nodes") for index in job.indices})
        elif job.indices:
            waiting.append(job)


class RewardHost:
    """The Ray actor: a RewardPool of one process."""

    def __init__(self, *arguments: Any):
        self._arguments = arguments
        self._pool: RewardPool | None = None

    def start(self) -> list[Outcome]:
        self._pool = RewardPool(1, *self._arguments)
        return []

    def score(self, attempts: list[Attempt]) -> list[Outcome]:
        return self._pool.score(attempts)


def _check_room(num_workers: int) -> None:
    import ray

    cpus = ray.cluster_resources().get("CPU", 0)
    if num_workers > cpus:
        raise ConfigError(f"reward.workers {num_workers} need as many CPUs, but the Ray cluster has {cpus:g}; lower it")
