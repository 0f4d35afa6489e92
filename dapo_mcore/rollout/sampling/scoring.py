"""Scores beside generation: what has been generated is scored in one thread while servers generate the rest.

Change here: when and in which order responses are scored. refill.py decides what follows from the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Lock, Thread

from dapo_mcore.types import Prompt, Rollout, Sample

Score = Callable[[Sequence[Prompt], Sequence[Rollout]], list[Sample]]
"""Returns the scored responses, in order."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The responses to one request, first generated, then scored.

    request    the engine's.
    generated  done once the request is, and always before `scored`.
    scored     done once the responses are scored, or with the error of the request or of the scoring.
    """

    request: Future[list[Rollout]]
    generated: Future[None] = field(default_factory=Future)
    scored: Future[list[Sample]] = field(default_factory=Future)

    def cancel(self) -> None:
        """Abort the request. A score that is being computed is dropped."""
        self.scored.cancel()
        self.request.cancel()


@dataclass(frozen=True, slots=True)
class _Job:
    prompts: Sequence[Prompt]
    rollouts: list[Rollout]
    scored: Future[list[Sample]]


class ScoringQueue:
    """Scores responses in the order in which they were generated, each time all that have arrived.

    So a slow score delays all that come after it, and the order in which scores are known does not depend on how long each
    takes. The thread runs while there is something to score.
    """

    def __init__(self, score: Score):
        self._score = score
        self._lock = Lock()
        self._waiting: list[_Job] = []
        self._running = False

    def follow(self, prompts: Sequence[Prompt], request: Future[list[Rollout]]) -> Answer:
        """Score the responses to `prompts` once they are generated."""
        answer = Answer(request)
        request.add_done_callback(lambda _: self._arrived(prompts, answer))
        return answer

    def _arrived(self, prompts: Sequence[Prompt], answer: Answer) -> None:
        answer.generated.set_result(None)
        if answer.request.cancelled():
            answer.scored.cancel()
        elif (error := answer.request.exception()) is not None:
            if answer.scored.set_running_or_notify_cancel():
                answer.scored.set_exception(error)
        else:
            self._put(_Job(prompts, answer.request.result(), answer.scored))

    def _put(self, job: _Job) -> None:
        with self._lock:
            self._waiting.append(job)
            starts, self._running = not self._running, True
        if starts:
            Thread(target=self._run, name="scoring", daemon=True).start()

    def _run(self) -> None:
        while jobs := self._next():
            _finish([job for job in jobs if job.scored.set_running_or_notify_cancel()], self._score)

    def _next(self) -> list[_Job]:
        with self._lock:
            jobs, self._waiting = self._waiting, []
            self._running = bool(jobs)
        return jobs


def _finish(jobs: list[_Job], score: Score) -> None:
    try:
        samples = iter(score([p for job in jobs for p in job.prompts], [r for job in jobs for r in job.rollouts]))
    except BaseException as error:  # whoever waits must learn of it, whatever it is
        for job in jobs:
            job.scored.set_exception(error)
        return
    for job in jobs:
        job.scored.set_result([next(samples) for _ in job.rollouts])
