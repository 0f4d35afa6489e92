"""Groups from servers that are kept full: each generated group is replaced at once, then scored and judged.

Change here: how many groups are in flight, and what happens to them once there are enough. Whether a group is trained on never
depends on how soon it finishes, except with sampling.on_full abort, which favours short responses. With keep, it only decides
in which step the group is trained on. Groups are judged one by one in the order in which they were generated, so it never
depends on how long a score takes, either.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

from dapo_mcore.rollout.sampling.forecast import groups_brought, groups_needed
from dapo_mcore.rollout.sampling.respond import Responder
from dapo_mcore.rollout.sampling.scoring import Answer
from dapo_mcore.rollout.sampling.step import KEEPS, Step
from dapo_mcore.types import Group, Prompt, Sample

_IMAGINED = 16.0
"""Weight of the steps before, in groups, in the estimate of how many groups are kept."""


@dataclass(frozen=True, slots=True)
class InFlight:
    """A group in flight: the responses that it has, and the request for `count` more.

    oldest  version of weights; no token of the group is made by older ones.
    answer  to that request.
    """

    prompt: Prompt
    samples: tuple[Sample, ...]
    count: int
    oldest: int
    answer: Answer


@dataclass(frozen=True, slots=True)
class Refilled:
    """The result of a step. Each list is in the order in which its groups were begun.

    groups      to train on.
    aborted     prompts whose groups were given up; a later step asks them again.
    pending     groups still in flight; the next step goes on with them.
    kept_ratio  share of groups that the next step may expect to keep.
    """

    groups: list[Group]
    aborted: list[Prompt]
    pending: list[InFlight]
    kept_ratio: float


class Refill:
    """Fills the batch of one rollout step.

    take        returns the next prompts.
    carried     groups of earlier steps that are in the batch already.
    pending     groups that are in flight already.
    kept_ratio  of the step before; None estimates it from the configuration.
    """

    def __init__(
        self,
        step: Step,
        responder: Responder,
        take: Callable[[int], list[Prompt]],
        carried: Sequence[Group] = (),
        pending: Sequence[InFlight] = (),
        kept_ratio: float | None = None,
    ):
        sampling = step.config.sampling
        self._step, self._responder, self._take = step, responder, take
        self._num_wanted = sampling.train_batch_prompts - len(carried)
        self._batch = sampling.gen_batch_prompts if sampling.style == "filter" else sampling.train_batch_prompts
        self._limit = sampling.max_in_flight_groups or self._batch
        self._on_full = sampling.on_full
        self._expected = kept_ratio or min(1.0, sampling.train_batch_prompts / sampling.gen_batch_prompts)
        self._adopted = pending
        self._in_flight: dict[int, InFlight] = {}
        self._finished: dict[int, Group] = {}
        self._kept: dict[int, Group] = {}
        # groups by weight version: a step has thousands, so a decision about one must not look at all of them
        self._kept_versions = Counter(group.weight_version for group in carried)
        self._oldest_in_flight: Counter[int] = Counter()
        self._done: SimpleQueue[int | None] = SimpleQueue()
        self._num_begun = self._num_good = self._num_generating = 0
        self._load = _Load()

    def run(self) -> Refilled:
        """Return at least the missing groups, unless max_gen_batches batches bring fewer. An error aborts all requests."""
        try:
            with self._responder.waiting():
                for number, group in enumerate(self._adopted):
                    self._responder.expect(group.count)
                    self._watch(number, group)
                self._fill()
        except BaseException:
            self._give_up()
            self._step.generated += _in_order(self._finished)
            raise
        pending = [self._in_flight[number] for number in sorted(self._in_flight)] if self._on_full == "keep" else []
        aborted = self._give_up() if self._on_full == "abort" else []
        self._step.generated += _in_order(self._finished)
        self._step.num_rounds = self._num_begun / self._batch
        counts = {"sampling/groups_aborted": float(len(aborted)), "sampling/groups_pending": float(len(pending))}
        self._step.more |= self._load.stats() | counts
        return Refilled(_in_order(self._kept), aborted, pending, self._kept_ratio())

    def _fill(self) -> None:
        """Generate until no group in flight must be waited for."""
        self._begin()
        self._load.now(self._num_generating, self.missing <= 0)
        while self._must_wait():
            number = self._wait()
            if number is None:
                self._num_generating -= 1
            else:
                self._receive(number)
            if self._done.empty():  # else more is known in a moment
                self._begin()
            self._load.now(self._num_generating, self.missing <= 0)

    def _must_wait(self) -> bool:
        if self.missing > 0 or self._on_full == "wait":
            return bool(self._in_flight)
        return self._on_full == "keep" and any(map(self._too_old_soon, +self._oldest_in_flight))

    def _too_old_soon(self, version: int) -> bool:
        """Return True if the following steps may be too few to train on all groups of weights as old as `version`.

        Such groups may be used in as many steps as `version` is newer than the oldest allowed version.
        """
        batch = self._step.config.sampling.train_batch_prompts
        kept = max(0, _up_to(version, self._kept_versions) - batch)  # the oldest are taken first
        in_flight = _up_to(version, self._oldest_in_flight)
        return kept + groups_brought(in_flight, self._kept_ratio()) > batch * (version - self._step.oldest)

    @property
    def missing(self) -> int:
        """Number of groups that the batch still lacks; negative if there are more than it takes."""
        return self._num_wanted - len(self._kept)

    @property
    def budget(self) -> int:
        """Number of groups that may still begin (sampling.max_gen_batches)."""
        return self._step.config.sampling.max_gen_batches * self._batch - self._num_begun

    def _begin(self) -> None:
        """Begin groups until those in flight very likely suffice, within the limits; with on_full keep as many as they allow."""
        # as many as the servers may work on, but while scores are late, no more than the same number of groups without scores
        room = min(self._limit - self._num_generating, 2 * self._limit - len(self._in_flight))
        wanted = groups_needed(self.missing, self._kept_ratio()) - len(self._in_flight)
        if self._on_full == "keep" and self.missing > 0:
            wanted = self._room_to_keep(room)
        for prompt in self._take(max(0, min(wanted, room, self.budget))):
            self._ask(len(self._adopted) + self._num_begun, prompt, (), self._step.config.rollout.group_size)
            self._num_begun += 1

    def _room_to_keep(self, room: int) -> int:
        """Return how many of `room` more groups can be trained on, now or in a later step, before they are too old."""
        steps = self._responder.weight_version - self._step.oldest + 1
        space = steps * self._step.config.sampling.train_batch_prompts - self._kept_versions.total()
        ratio, in_flight = self._kept_ratio(), len(self._in_flight)
        return bisect_right(range(room), space, key=lambda more: groups_brought(in_flight + more + 1, ratio))

    def _kept_ratio(self) -> float:
        """Return the expected share of groups that are kept: that of this step so far, together with a few imagined groups with
        the share of the steps before.

        train_batch_prompts / gen_batch_prompts of the configuration alone may be far off: on easier data each step would begin
        more groups than can be trained on in time.
        """
        if self._step.config.sampling.style != "filter":
            return 1.0  # a group that is given up is replaced when it is
        return (self._expected * _IMAGINED + self._num_good) / (_IMAGINED + len(self._finished))

    def _ask(self, number: int, prompt: Prompt, samples: tuple[Sample, ...], count: int) -> None:
        # read before the request is sent: an update may be under way
        oldest = min([self._responder.weight_version, *(sample.rollout.weight_version for sample in samples)])
        answer = self._responder.submit([prompt] * count, self._step.next_params())
        self._watch(number, InFlight(prompt, samples, count, oldest, answer))

    def _watch(self, number: int, group: InFlight) -> None:
        self._in_flight[number] = group
        self._oldest_in_flight[group.oldest] += 1
        self._num_generating += 1
        done = self._done  # not self: a future may outlive this step
        group.answer.generated.add_done_callback(lambda _: done.put(None))
        group.answer.scored.add_done_callback(lambda _: done.put(number))

    def _wait(self) -> int | None:
        """Wait until a group is scored, and return its number, or None when a group has been generated."""
        if self._num_generating:
            return self._done.get()
        with self._responder.waiting_for_scores():
            return self._done.get()

    def _receive(self, number: int) -> None:
        """Take a group that is scored. It is then finished, or grows (style resample)."""
        asked = self._in_flight.pop(number)
        self._oldest_in_flight[asked.oldest] -= 1
        group = Group(asked.prompt, asked.samples + tuple(asked.answer.scored.result()))
        growth = self._step.growth(group) if self._step.config.sampling.style == "resample" else 0
        if growth:
            self._step.num_extra += growth
            self._ask(number, group.prompt, group.samples, growth)
        else:
            self._finish(number, group)
        if len(self._finished) >= self._step.config.sampling.train_batch_prompts:
            self._step.check_scored(self._finished.values())

    def _finish(self, number: int, group: Group) -> None:
        self._finished[number] = group
        if not KEEPS[self._step.config.sampling.style](group):
            return
        self._num_good += 1
        if group.weight_version < self._step.oldest:
            self._step.num_stale += 1
        else:
            self._kept[number] = group
            self._kept_versions[group.weight_version] += 1

    def _give_up(self) -> list[Prompt]:
        """Abort all requests and return their prompts in the order in which they were begun."""
        given_up, self._in_flight = self._in_flight, {}
        for asked in given_up.values():
            asked.answer.cancel()
        return [given_up[number].prompt for number in sorted(given_up)]


class _Load:
    """The number of groups in flight over time."""

    def __init__(self) -> None:
        self._start = self._mark = time.monotonic()
        self._count = self._most = 0
        self._group_seconds = 0.0
        self._enough_at: float | None = None

    def now(self, count: int, enough: bool) -> None:
        """Note that `count` groups are in flight from now on, and whether they are enough."""
        mark = time.monotonic()
        self._group_seconds += self._count * (mark - self._mark)
        self._mark, self._count, self._most = mark, count, max(self._most, count)
        if enough and self._enough_at is None:
            self._enough_at = mark

    def stats(self) -> dict[str, float]:
        seconds = self._mark - self._start
        return {
            "sampling/in_flight_max": float(self._most),
            "sampling/in_flight_mean": self._group_seconds / seconds if seconds else 0.0,
            "sampling/surplus_wait_s": self._mark - self._enough_at if self._enough_at is not None else 0.0,
        }


def _up_to(version: int, counts: Counter[int]) -> int:
    """Return how many groups have this version or an older one."""
    return sum(count for other, count in counts.items() if other <= version)


def _in_order(groups: dict[int, Group]) -> list[Group]:
    return [groups[number] for number in sorted(groups)]
