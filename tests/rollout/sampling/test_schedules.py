"""Random runs of the sampler, in one thread: groups finish in any order, weights change and runs restart at any time.

A play draws a valid configuration, a data set and a schedule from one seed, and keeps its own account of every prompt. With
style filter a step begins groups by a forecast of how many are kept. With bad luck a group becomes too old: such a loss is
allowed, but it must be counted.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import pytest
from pydantic import ValidationError

from dapo_mcore.config.schema import Config
from dapo_mcore.data.loader import PromptLoader
from dapo_mcore.errors import RewardError, RolloutError
from dapo_mcore.rollout.sampling import scoring
from dapo_mcore.rollout.sampling.refill import Refill
from dapo_mcore.rollout.sampling.sampler import Collected, Sampler
from dapo_mcore.rollout.sampling.step import KEEPS
from dapo_mcore.types import Group, Prompt, Rollout, SamplingParams
from tests.rollout.sampling.scripted import ScriptedEngine, ThreadOfItsCaller, begun_by, decode, make_prompts, reward

SCRIPTS = ("RW", "RW", "WR", "RR", "WW", "RRRW", "WWR", "FRW", "FF", "F")


@dataclass(eq=False)
class Request:
    number: int
    count: int
    version: int
    slow: bool
    place: int
    future: Future[list[Rollout]] = field(default_factory=Future)


class RandomEngine(ScriptedEngine):
    """Servers whose requests finish in a random order, in the sampler's own thread, when `advance` is called.

    moves  versions to which the weights may go at any moment while groups are collected.
    """

    def __init__(self, prompts: list[Prompt], luck: random.Random, version: int, max_lag: int):
        super().__init__(prompts, version)
        self.requests: list[Request] = []
        self.begun: dict[int, int] = {}
        self.answers: list[Rollout] = []
        self.moves: list[int] = []
        self.most = 0
        self._luck, self._max_lag = luck, max_lag
        self._eagerness, self._slow = luck.choice((0.1, 0.5, 1.0)), luck.choice((0, 0.2, 0.5))
        self._early = luck.choice((0, 0, 0.1))

    def submit(self, prompts: list[np.ndarray], params: SamplingParams) -> Future[list[Rollout]]:
        (number,) = {int(prompt[0]) for prompt in prompts}
        self.calls.append((len(prompts), params))
        slow = self._luck.random() < self._slow
        request = Request(number, len(prompts), self.weight_version, slow, len(self.calls))
        self.requests.append(request)
        self.most = max(self.most, len(self.alive()))
        self.maybe_move()
        if self._luck.random() < self._early:
            self.end(request)
        return request.future

    def alive(self) -> list[Request]:
        self.requests = [request for request in self.requests if not request.future.done()]
        return self.requests

    def maybe_move(self) -> None:
        if self.moves and self._luck.random() < 0.2:
            self.move(self.moves.pop(0))

    def move(self, version: int) -> None:
        assert not self.alive() or self._max_lag, "requests are in flight, and the weights move"
        self.weight_version = version
        for request in self.alive():
            assert version - request.version <= self._max_lag, "a response would be thrown away for its age"

    def advance(self) -> None:
        """End at least one request, if there are any."""
        self.maybe_move()
        alive = self.alive()
        ready = [request for request in alive if not request.slow] or alive
        if self._luck.random() < 0.1:
            ready = alive
        chosen = [request for request in ready if self._luck.random() < self._eagerness] or ready[:1]
        self._luck.shuffle(chosen)
        for request in chosen:
            self.end(request)

    def end(self, request: Request) -> None:
        made = [begun_by(request.version, self.respond(request.number)) for _ in range(request.count)]
        self.answers += made  # kept alive, so that no other gets its id
        self.begun |= {id(rollout): request.place for rollout in made}
        request.future.set_result(made)


class BatchEngine(ScriptedEngine):
    """An engine that generates one batch at a time, with the same interface."""

    def __init__(self, prompts: list[Prompt], luck: random.Random, version: int, max_lag: int):
        super().__init__(prompts, version)
        self.moves, self.most = [], 0

    def alive(self) -> list[Request]:
        return []

    def move(self, version: int) -> None:
        self.weight_version = version

    def advance(self) -> None: ...


def draw_config(luck: random.Random, **fixed: object) -> Config:
    """Return a valid configuration. `fixed` are keys of the section `sampling`."""
    while True:
        train = luck.randint(1, 5)
        sampling = {
            "style": luck.choice(("none", "filter", "resample")),
            "train_batch_prompts": train,
            "gen_batch_prompts": luck.randint(1, 3 * train),
            "max_gen_batches": luck.choice((1, 2, 3, 50)),
            "on_exhausted": luck.choice(("error", "train_on_what_we_have")),
            "carry_surplus": luck.random() < 0.8,
            "max_staleness": luck.randint(0, 3),
            "max_in_flight_groups": luck.choice((None, luck.randint(1, 12))),
            "on_full": luck.choice(("wait", "abort", "keep")),
            "resample_size": luck.randint(1, 3),
            "max_samples_per_prompt": luck.randint(1, 6),
        } | fixed
        try:
            return Config.model_validate(
                {
                    "seed": luck.randint(0, 99),
                    "model": {"path": "unused"},
                    "data": {"files": ["unused"]},
                    "rollout": {
                        "engine": luck.choice(("sglang", "sglang", "sglang", "embedded")),
                        "group_size": luck.randint(1, 3),
                        "max_response_tokens": 64,
                        "async_steps": luck.randint(0, 1),
                    },
                    "reward": {"workers": 1},
                    "sampling": sampling,
                    "batch": {"mini_batch_prompts": 1},
                    "algo": {"old_logprobs": "rollout"},
                }
            )
        except ValidationError:
            continue


class RecordingLoader(PromptLoader):
    """A loader that remembers the prompts that it gave."""

    def __init__(self, prompts: list[Prompt], num_epochs: int | None):
        self.given: list[str] = []
        super().__init__(prompts, seed=0, shuffle=False, num_epochs=num_epochs)

    def take(self, n: int) -> list[Prompt]:
        taken = super().take(n)
        self.given += [prompt.uid for prompt in taken]
        return taken


def uid_counts(groups: list[Group]) -> Counter[str]:
    return Counter(group.prompt.uid for group in groups)


@dataclass
class Account:
    """What became of every prompt that was taken."""

    trained: Counter[str] = field(default_factory=Counter)
    given_up: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    num_counted: int = 0

    def copy(self) -> Account:
        return Account(self.trained.copy(), self.given_up.copy(), self.dropped.copy(), self.num_counted)


class Play:
    """A run of some steps, or of whole epochs, in the order of controller.py.

    With `async_steps` a step is collected while the one before it trains, and a restart repeats it.
    """

    def __init__(
        self, seed: int, num_steps: int = 8, restarts: bool = True, num_epochs: int | None = None, **fixed: object
    ):
        self.luck = random.Random(seed)
        self.config = draw_config(self.luck, **fixed)
        self.restarts = restarts
        s = self.config.sampling
        good = self.luck.choice((0.3, 0.7, 1.0))
        self.all_good = good == 1.0
        num_prompts = self.luck.choice((7, 400) if num_epochs is None else (7, 23))
        self.prompts = make_prompts(
            *[self.luck.choice(SCRIPTS) if self.luck.random() > good else "RW" for _ in range(num_prompts)]
        )
        self.lag = self.config.rollout.async_steps
        self.keeps = s.on_full == "keep"
        self.num_steps = num_steps
        self.loader = RecordingLoader(self.prompts, num_epochs)
        self.account = Account()
        self.steps: list[Collected] = []
        self.is_over = False  # the last epoch
        self.new_sampler(version=0)

    def new_sampler(self, version: int) -> None:
        kind = RandomEngine if self.config.rollout.engine == "sglang" else BatchEngine
        s = self.config.sampling
        self.engine = kind(self.prompts, self.luck, version, s.max_staleness if self.keeps else 0)
        self.sampler = Sampler(self.engine, self.loader, reward, decode, self.config)

    def run(self) -> None:
        ahead: Collected | None = None  # in this test it is complete before the training of the step before it begins
        for step in range(1, self.num_steps + 1):
            collected = ahead or self.collect(step, lag=0)
            if self.is_over and not collected.groups:
                return
            self.steps.append(collected)
            position = self.position()
            ahead, num_left = None, self.sampler.num_left
            if self.lag and step < self.num_steps and num_left:
                self.engine.moves = [step] if self.keeps else []
                ahead = self.collect(step + 1, lag=1)
                self.engine.moves = []
            if self.engine.weight_version < step:
                if self.luck.random() < 0.5 and self.engine.alive():
                    self.engine.advance()
                self.engine.move(step)
            if self.restarts and self.luck.random() < 0.3:
                self.restart(position, step)
                ahead = None
                assert self.sampler.num_left == num_left
            if not num_left:
                return

    def position(self) -> tuple:
        state, arrays = self.sampler.state()
        return json.dumps([self.loader.state(), state]), arrays, self.account.copy(), len(self.loader.given)

    def restart(self, position: tuple, version: int) -> None:
        stored, arrays, self.account, num_given = position
        place, state = json.loads(stored)
        self.loader.load_state(place)
        self.loader.given = self.loader.given[:num_given]
        self.new_sampler(version)
        self.sampler.load_state(state, arrays, {prompt.uid: prompt for prompt in self.prompts})
        assert json.dumps(self.sampler.state()[0]) == json.dumps(state)

    def collect(self, step: int, lag: int) -> Collected:
        s = self.config.sampling
        oldest = self.engine.weight_version + lag - s.max_staleness
        before = list(self.sampler.snapshot().carried)
        collected = self.sampler.collect(step, lag)
        self.check_batch(collected, oldest)
        self.check_order(before, collected, oldest)
        self.note(before, collected, oldest)
        self.is_over = not self.sampler.num_left
        assert self.engine.most <= self.limit
        assert self.keeps or not self.engine.alive(), "left in flight"
        return collected

    @property
    def batch(self) -> int:
        s = self.config.sampling
        return s.gen_batch_prompts if s.style == "filter" else s.train_batch_prompts

    @property
    def limit(self) -> int:
        return self.config.sampling.max_in_flight_groups or self.batch

    @property
    def all_begun(self) -> bool:
        """True if no prompt is left to begin with, because the last epoch ends."""
        return not self.loader.num_left + len(self.sampler._again)

    def check_wait(self, refill: Refill) -> None:
        """Check that servers are not idle while groups are missing."""
        num_in_flight = len(self.engine.alive())
        assert num_in_flight, "the sampler waits, and nothing is in flight"
        assert num_in_flight >= refill.missing or num_in_flight == self.limit or not refill.budget or self.all_begun

    def check_batch(self, collected: Collected, oldest: int) -> None:
        s, stats, groups = self.config.sampling, collected.stats, collected.groups
        if len(groups) < s.train_batch_prompts and self.all_begun:
            assert not self.sampler.num_left, "this step is the last"
        elif len(groups) < s.train_batch_prompts:
            assert s.on_exhausted == "train_on_what_we_have" and groups
            assert stats["sampling/gen_batches"] == s.max_gen_batches
        assert len(groups) <= s.train_batch_prompts
        versions = [min(sample.rollout.weight_version for sample in group.samples) for group in groups]
        assert min(versions, default=oldest) >= oldest
        assert not groups or stats["sampling/staleness_max"] == oldest + s.max_staleness - min(versions)
        assert stats["sampling/groups_kept"] == len(groups)
        assert stats["sampling/groups_generated"] == len(collected.generated)
        assert all(KEEPS[s.style](group) for group in groups)
        most = s.max_samples_per_prompt if s.style == "resample" else self.config.rollout.group_size
        for group in collected.generated + groups:
            assert self.config.rollout.group_size <= len(group.samples) <= most

    def fresh(self, groups: list[Group], oldest: int) -> list[Group]:
        keep = KEEPS[self.config.sampling.style]
        return [group for group in groups if keep(group) and group.weight_version >= oldest]

    def check_order(self, carried: list[Group], collected: Collected, oldest: int) -> None:
        """Check that no group is preferred because it finished earlier."""
        s = self.config.sampling
        if isinstance(self.engine, RandomEngine):
            places = [self.engine.begun[id(group.samples[0].rollout)] for group in collected.generated]
            assert places == sorted(places), "in the order in which they were begun"
        groups = sorted(self.fresh(carried + collected.generated, oldest), key=lambda group: group.weight_version)
        assert collected.groups == groups[: s.train_batch_prompts]
        assert self.sampler.snapshot().carried == (groups[s.train_batch_prompts :] if s.carry_surplus else [])

    def note(self, carried: list[Group], collected: Collected, oldest: int) -> None:
        """Check that every prompt that was taken is in one place, once."""
        s, account, stats = self.config.sampling, self.account, collected.stats
        keep, there = KEEPS[s.style], carried + collected.generated
        good = [group for group in there if keep(group)]
        fresh = self.fresh(there, oldest)
        account.trained += uid_counts(collected.groups)
        account.given_up += uid_counts([group for group in there if not keep(group)])
        account.dropped += uid_counts([group for group in good if group.weight_version < oldest])
        assert stats["sampling/groups_stale"] == len(good) - len(fresh)
        if not s.carry_surplus:
            account.dropped += uid_counts(
                sorted(fresh, key=lambda group: group.weight_version)[s.train_batch_prompts :]
            )
        state = self.sampler.state()[0]
        left = Counter(group["uid"] for group in state["groups"]) + Counter(state["again"])
        assert stats["sampling/surplus_carried"] == len(state["groups"])
        known = account.trained + account.given_up + account.dropped + left
        assert known == Counter(self.loader.given)
        counted = stats["sampling/surplus_dropped"] + sum(
            group.weight_version < oldest for group in collected.generated if keep(group)
        )
        account.num_counted += int(counted)
        assert account.num_counted == account.dropped.total()
        certain = s.style != "filter" or (self.all_good and s.gen_batch_prompts <= s.train_batch_prompts)
        if self.keeps and certain and s.carry_surplus:
            assert not account.dropped, "lost for its age"


def play(seed: int, **fixed: object) -> Play:
    """Return a finished play. It may end early with the documented errors."""
    made = Play(seed, **fixed)
    receive = Refill._wait

    def wait(self: Refill) -> int | None:
        if self._done.empty():
            made.check_wait(self)
            made.engine.advance()
        assert not self._done.empty(), "nothing finishes that it waits for"
        return receive(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Refill, "_wait", wait)
        patch.setattr(scoring, "Thread", ThreadOfItsCaller)
        try:
            made.run()
        except RolloutError as error:
            assert "after sampling.max_gen_batches" in str(error), error
            assert made.config.sampling.on_exhausted == "error" or str(error).startswith("0 of")
        except RewardError as error:
            assert "has a score" in str(error), error
        except Exception as error:
            error.add_note(f"seed {seed}: {made.config.sampling}, {made.config.rollout.engine}, lag {made.lag}")
            raise
    return made


@pytest.mark.parametrize("on_full", ["wait", "abort", "keep"])
def test_every_prompt_is_accounted_for_in_any_order_of_finishing(on_full):
    plays = [play(seed, on_full=on_full) for seed in range(150)]
    assert sum(len(made.steps) for made in plays) > 600, "most runs must get somewhere"


@pytest.mark.parametrize("on_full", ["wait", "abort", "keep"])
def test_epochs_use_every_prompt_once_each_and_end_in_any_order_of_finishing(on_full):
    options = {"on_exhausted": "train_on_what_we_have", "max_gen_batches": 50}
    plays = [play(seed, num_steps=200, num_epochs=2, on_full=on_full, **options) for seed in range(100)]
    over = [made for made in plays if made.is_over]
    assert len(over) > 80, "else a step had not one group that varies, or no score"
    for made in over:
        used = made.account.trained + made.account.given_up + made.account.dropped
        assert used == {prompt.uid: 2 for prompt in made.prompts}


def test_the_same_schedule_brings_the_same_groups():
    def trained(seed: int) -> list[list[str]]:
        return [[group.prompt.uid for group in step.groups] for step in play(seed).steps]

    assert [trained(seed) for seed in range(10)] == [trained(seed) for seed in range(10)]
