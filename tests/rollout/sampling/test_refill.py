"""Continuous refill with an engine whose responses finish when the test says so.

The letters of a prompt's text say how its responses turn out, as in scripted.py.
"""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from unittest.mock import Mock

import numpy as np
import pytest

from dapo_mcore.data.loader import PromptLoader
from dapo_mcore.errors import RewardError, RolloutError
from dapo_mcore.rollout.sampling import refill, scoring
from dapo_mcore.rollout.sampling.sampler import Collected, Sampler
from dapo_mcore.types import ContinuousEngine, Prompt, Rollout, SamplingParams, Score
from tests.rollout.sampling.scripted import (
    MIXED,
    RIGHT,
    WRONG,
    ScriptedEngine,
    ThreadOfItsCaller,
    begun_by,
    decode,
    letters,
    make_config,
    make_prompts,
    reward,
    uids,
)


class SlowEngine(ScriptedEngine):
    """An engine that finishes groups when the sampler waits for one; `order` says which.

    order  gets the numbers of the prompts in flight, in the order of submission, and returns those that finish.
    Weights may change meanwhile: the last token of a response has the version of when it finishes, the others that of when
    it was submitted.
    """

    def __init__(self, prompts: list[Prompt], order: Callable[[list[int]], list[int]], version: int = 1):
        super().__init__(prompts, version)
        self.in_flight: dict[int, tuple[Future, int, int]] = {}
        self.submitted: list[int] = []
        self.most = 0
        self.order = order

    def submit(self, prompts: list[np.ndarray], params: SamplingParams) -> Future[list[Rollout]]:
        (number,) = {int(prompt[0]) for prompt in prompts}
        future: Future[list[Rollout]] = Future()
        waiting = self.in_flight.get(number)
        assert waiting is None or waiting[0].cancelled(), "this engine knows its requests by their prompts"
        self.calls.append((len(prompts), params))
        self.submitted.append(number)
        self.in_flight.pop(number, None)
        self.in_flight[number] = future, len(prompts), self.weight_version
        self.most = max(self.most, len(self.running))
        return future

    @property
    def running(self) -> list[int]:
        return [number for number, (future, *_) in self.in_flight.items() if not future.cancelled()]

    @property
    def cancelled(self) -> list[int]:
        return [number for number, (future, *_) in self.in_flight.items() if future.cancelled()]

    def move(self) -> None:
        for number in self.order(self.running):
            future, count, version = self.in_flight.pop(number)
            future.set_result([begun_by(version, self.respond(number)) for _ in range(count)])


def one_by_one_last_first(in_flight: list[int]) -> list[int]:
    return [max(in_flight)]


def one_by_one(in_flight: list[int]) -> list[int]:
    return [min(in_flight)]


@pytest.fixture
def collect(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Sampler, SlowEngine]]:
    """Return a function that builds a sampler with its engine.

    The newest engine moves whenever the sampler waits, in the sampler's thread. Each move takes a second of a made-up clock;
    nothing else takes time.
    """
    clock, engines = Mock(monotonic=Mock(return_value=0.0)), []

    class MovingQueue(SimpleQueue):
        def get(self) -> int:
            for _ in range(100):
                if not self.empty():
                    return super().get()
                clock.monotonic.return_value += 1.0
                engines[-1].move()
            raise AssertionError("the sampler waits, but nothing finishes")

    monkeypatch.setattr(refill, "SimpleQueue", MovingQueue)
    monkeypatch.setattr(refill, "time", clock)
    monkeypatch.setattr(scoring, "Thread", ThreadOfItsCaller)

    def build(scripts: list[str], order, style: str = "filter", taken: int = 0, reward=reward, **sampling):
        """Return a sampler and its engine. The run that it resumes has taken `taken` prompts from the loader."""
        prompts = make_prompts(*scripts)
        engines.append(SlowEngine(prompts, order))
        loader = PromptLoader(prompts, seed=0, shuffle=False)
        loader.take(taken)
        return Sampler(engines[-1], loader, reward, decode, make_config(style, engine="sglang", **sampling)), engines[
            -1
        ]

    return build


def test_only_engines_with_submit_are_continuous(collect):
    assert isinstance(collect([MIXED], one_by_one, train=1)[1], ContinuousEngine)
    assert not isinstance(ScriptedEngine([]), ContinuousEngine)


def test_a_finished_group_is_replaced_at_once_and_never_more_are_in_flight_than_allowed(collect):
    scripts = [WRONG, MIXED, RIGHT, MIXED, WRONG, MIXED, WRONG, MIXED]
    sampler, engine = collect(scripts, one_by_one, train=3, gen_batch_prompts=6, max_in_flight_groups=2)
    collected = sampler.collect(step=0)
    # always 2 in flight, until 1, 3 and 5 are kept; then the sampler waits for 6
    assert engine.submitted == [0, 1, 2, 3, 4, 5, 6]
    assert engine.most == 2
    assert uids(collected.groups) == [1, 3, 5] and uids(collected.generated) == [0, 1, 2, 3, 4, 5, 6]
    stats = collected.stats
    # in 7 seconds, the last of them with group 6 alone
    assert stats["sampling/in_flight_max"] == 2 and stats["sampling/in_flight_mean"] == (6 * 2 + 1 * 1) / 7
    assert stats["sampling/gen_batches"] == pytest.approx(7 / 6) and stats["sampling/groups_aborted"] == 0
    assert stats["sampling/surplus_wait_s"] == 1.0
    assert len({params.seed for _, params in engine.calls}) == 7


def test_groups_come_in_prompt_order_for_any_order_of_finishing(collect):
    scripts = [MIXED] * 20
    for order in (one_by_one, one_by_one_last_first, lambda in_flight: in_flight):
        sampler, _ = collect(scripts, order, train=2, gen_batch_prompts=4)
        collected = sampler.collect(step=0)
        # the sampler waits for the slowest: whether a group is trained on must not depend on its speed
        assert uids(collected.groups) == [0, 1] and uids(collected.generated)[:4] == [0, 1, 2, 3]
        assert collected.stats["sampling/surplus_carried"] == len(collected.generated) - 2
        assert uids(sampler.collect(step=1).groups) == [2, 3]


def test_nothing_more_is_begun_than_is_expected_to_be_needed(collect):
    sampler, engine = collect([MIXED] * 20, one_by_one, train=4, gen_batch_prompts=4)
    assert uids(sampler.collect(step=0).groups) == [0, 1, 2, 3]
    assert engine.submitted == [0, 1, 2, 3]  # gen_batch_prompts = train_batch_prompts promises that all are kept


def test_abort_ends_what_is_in_flight_and_begins_with_its_prompts_next_time(collect):
    sampler, engine = collect(
        [MIXED] * 12, one_by_one_last_first, train=2, gen_batch_prompts=6, on_full="abort", max_in_flight_groups=6
    )
    first = sampler.collect(step=0)
    assert uids(first.groups) == [5, 6]  # the first to finish, which is biased, as documented; 6 took the place of 5
    assert first.stats["sampling/groups_aborted"] == 5
    assert sampler.state()[0]["again"] == [f"train:{number}" for number in range(5)]
    assert engine.cancelled == [0, 1, 2, 3, 4] and not engine.running
    second = sampler.collect(step=1)
    assert engine.submitted[7:] == [0, 1, 2, 3, 4, 7, 8]
    assert uids(second.groups) == [7, 8]


def test_aborted_prompts_survive_a_restart(collect):
    options = dict(train=2, gen_batch_prompts=6, on_full="abort")
    sampler, _ = collect([MIXED] * 12, one_by_one_last_first, **options)
    sampler.collect(step=0)
    state, arrays = sampler.state()
    resumed, engine = collect([MIXED] * 12, one_by_one, taken=7, **options)
    prompts = make_prompts(*[MIXED] * 12)
    resumed.load_state(json.loads(json.dumps(state)), arrays, {prompt.uid: prompt for prompt in prompts})
    assert uids(resumed.collect(step=1).groups) == [0, 1]
    assert engine.submitted == [0, 1, 2, 3, 4, 7, 8]


def keeping(collect, scripts: list[str], order, style: str = "none", **sampling) -> tuple[Sampler, SlowEngine]:
    return collect(scripts, order, style=style, on_full="keep", **sampling)


def pending(sampler: Sampler) -> list[int]:
    return [int(uid.removeprefix("train:")) for uid in sampler.state()[0]["again"]]


def test_kept_groups_stay_in_flight_until_later_steps_could_not_train_on_them(collect):
    options = dict(train=2, max_in_flight_groups=4, max_staleness=2)
    sampler, engine = keeping(collect, [MIXED] * 12, one_by_one_last_first, **options)
    first = sampler.collect(step=1)  # by version 1: 4 in flight until 3 and 4 are finished
    assert uids(first.groups) == [3, 4] and pending(sampler) == [0, 1, 2]
    assert first.stats["sampling/groups_pending"] == 3 and first.stats["sampling/surplus_wait_s"] == 0
    engine.weight_version = 2
    # 5 and 6 suffice, but step 3 could not train on 0, 1 and 2 at once, and step 4 on none of them: it waits for 2
    second = sampler.collect(step=2)
    assert engine.submitted == [0, 1, 2, 3, 4, 5, 6]
    assert uids(second.groups) == [2, 5] and uids(second.generated) == [2, 5, 6] and pending(sampler) == [0, 1]
    assert second.stats["sampling/groups_pending"] == 2 and second.stats["sampling/surplus_carried"] == 1
    engine.weight_version = 3
    third = sampler.collect(step=3)  # it waits for 0 and 1, and trains on them before the newer ones
    assert engine.submitted[7:] == [7, 8]
    assert uids(third.groups) == [0, 1] and uids(third.generated) == [0, 1, 7, 8] and pending(sampler) == []
    assert third.stats["sampling/staleness_max"] == 2 and third.stats["sampling/surplus_reused"] == 0
    # 2 groups of a response of 1 token by version 1, and one of 2 tokens by versions 1 and 3
    assert third.stats["sampling/samples_resumed"] == 2
    assert third.stats["sampling/token_staleness_mean"] == pytest.approx(4 * 2 / 6)
    fourth = sampler.collect(step=4)
    assert uids(fourth.groups) == [6, 7] and fourth.stats["sampling/surplus_reused"] == 2
    steps = (first, second, third, fourth)
    assert all(s.stats["sampling/groups_stale"] == 0 for s in steps)
    assert not engine.cancelled
    # the fourth step generated nothing but has every metric, so curves have no gaps
    assert all(s.stats.keys() == first.stats.keys() for s in steps)
    assert fourth.stats["sampling/groups_pending"] == fourth.stats["sampling/in_flight_max"] == 0


@pytest.mark.parametrize("style", ["none", "filter"])
@pytest.mark.parametrize(("max_staleness", "lag"), [(1, 0), (2, 0), (3, 0), (2, 1), (3, 1)])
@pytest.mark.parametrize("at_once", [1, 4])
def test_no_group_is_lost_for_being_slow_or_trained_on_twice(collect, style, max_staleness, lag, at_once):
    """With a lag, the weights may change at any time during a step, as they do while training runs."""
    scripts = [MIXED if number % 3 else RIGHT for number in range(200)]
    luck = random.Random(max_staleness)

    def slow_some(in_flight: list[int]) -> list[int]:
        """Finish prompts at random, but every fifth one late."""
        if lag and luck.random() < 0.3:
            engine.weight_version = 1 + len(steps) + lag
        ready = [number for number in in_flight if number % 5] or in_flight
        return luck.sample(ready, min(at_once, len(ready)))

    most = (max_staleness - lag) * (3 if style == "none" else 5)
    options = dict(train=3, gen_batch_prompts=5, max_in_flight_groups=most, max_staleness=max_staleness)
    sampler, engine = keeping(collect, scripts, slow_some, style, **options)
    steps: list[Collected] = []
    for version in range(1, 11):
        engine.weight_version = version
        steps.append(sampler.collect(version, lag))
    trained = Counter(uid for step in steps for uid in uids(step.groups))
    left = {int(group["uid"].removeprefix("train:")) for group in sampler.state()[0]["groups"]} | set(pending(sampler))
    good = {number for number in engine.submitted if style == "none" or scripts[number] == MIXED}
    assert set(trained.values()) == {1} and sum(trained.values()) == 30
    assert set(trained) | left >= good and set(trained) <= good
    assert all(step.stats["sampling/groups_stale"] == step.stats["sampling/surplus_dropped"] == 0 for step in steps)
    assert 1 <= max(step.stats["sampling/staleness_max"] for step in steps) <= max_staleness
    assert any(number % 5 == 0 for number in trained) and engine.most <= most and not engine.cancelled


def test_prompts_of_pending_groups_survive_a_restart(collect):
    options = dict(train=2, max_in_flight_groups=4, max_staleness=2)
    sampler, _ = keeping(collect, [MIXED] * 12, one_by_one_last_first, **options)
    assert uids(sampler.collect(step=1).groups) == [3, 4]
    state, arrays = sampler.state()
    resumed, engine = keeping(collect, [MIXED] * 12, one_by_one, taken=5, **options)
    prompts = make_prompts(*[MIXED] * 12)
    resumed.load_state(json.loads(json.dumps(state)), arrays, {prompt.uid: prompt for prompt in prompts})
    assert uids(resumed.collect(step=2).groups) == [0, 1]
    assert engine.submitted[:3] == [0, 1, 2]


def test_a_pending_group_goes_on_growing_and_is_as_old_as_its_first_response(collect):
    def others_first(in_flight: list[int]) -> list[int]:
        return [number for number in in_flight if number] or in_flight

    options = dict(train=1, max_in_flight_groups=2, resample_size=2, max_staleness=2)
    sampler, engine = keeping(collect, ["RRRW", MIXED, MIXED, MIXED], others_first, "resample", **options)
    assert uids(sampler.collect(step=1).groups) == [1] and pending(sampler) == [0]
    engine.weight_version = 3
    step = sampler.collect(step=2)
    assert uids(step.groups) == [0] and letters(step.groups[0]) == "RRRW"
    assert [sample.rollout.weight_version for sample in step.groups[0].samples] == [1, 1, 3, 3]
    assert step.stats["sampling/staleness_max"] == 2 and step.stats["sampling/resample_rate"] > 0


def test_resample_grows_each_group_by_itself(collect):
    def slow_first(in_flight: list[int]) -> list[int]:
        return [n for n in in_flight if n != 1] or in_flight

    sampler, engine = collect(
        ["RRRW", MIXED, "WWWW", MIXED], slow_first, style="resample", train=3, resample_size=1, max_samples_per_prompt=4
    )
    collected = sampler.collect(step=0)
    assert [letters(group) for group in collected.groups] == ["RRRW", "RW", "RW"]
    assert uids(collected.groups) == [0, 1, 3] and uids(collected.generated) == [0, 1, 2, 3]
    # 0 and 2 grew twice, and 3 replaced 2, all while 1 was in flight
    assert sorted(engine.submitted) == [0, 0, 0, 1, 2, 2, 2, 3]
    assert collected.stats["sampling/resample_rate"] == 4 / 12


def test_style_none_trains_on_every_group_that_it_begins(collect):
    sampler, engine = collect([WRONG] * 6, one_by_one_last_first, style="none", train=3, max_in_flight_groups=2)
    assert uids(sampler.collect(step=0).groups) == [0, 1, 2] and engine.submitted == [0, 1, 2]


def test_the_budget_of_groups_is_max_gen_batches_batches(collect):
    sampler, engine = collect([WRONG] * 30, one_by_one, train=2, gen_batch_prompts=3, max_gen_batches=4)
    with pytest.raises(RolloutError, match=r"0 of .* after sampling.max_gen_batches 4 .*12 all wrong"):
        sampler.collect(step=0)
    assert len(engine.submitted) == 12


def test_a_reward_that_fails_on_every_sample_ends_the_run_with_the_first_batch(collect):
    sampler, engine = collect(["F"] * 30, one_by_one, train=2, gen_batch_prompts=3, max_gen_batches=4)
    with pytest.raises(RewardError, match="none of the 4 samples of rollout step 7 has a score; the first: timeout"):
        sampler.collect(step=7)
    assert len(engine.submitted) < 12 and engine.running == []


def test_groups_older_than_allowed_are_dropped_and_counted(collect):
    sampler, engine = collect([MIXED] * 6, one_by_one, train=1, gen_batch_prompts=1, max_staleness=1)
    respond = engine.respond

    def by_old_weights(prompt: int) -> Rollout:
        made = respond(prompt)
        return made if prompt else Rollout(made.token_ids, made.logprobs, made.loss_mask, "stop", weight_version=0)

    engine.respond = by_old_weights
    collected = sampler.collect(step=0, lag=1)  # trained on by version 2; the engine holds 1
    assert uids(collected.groups) == [1] and uids(collected.generated) == [0, 1]
    assert collected.stats["sampling/groups_stale"] == 1
    assert collected.stats["sampling/staleness_mean"] == collected.stats["sampling/staleness_max"] == 1


def test_surplus_collected_ahead_ages_by_the_lag(collect):
    def second_step(max_staleness: int) -> Collected:
        sampler, engine = collect([MIXED] * 8, one_by_one, train=1, gen_batch_prompts=2, max_staleness=max_staleness)
        sampler.collect(step=1, lag=1)
        engine.weight_version = 2
        return sampler.collect(step=2, lag=1)  # group 1 has version 1 and would be trained on by version 3

    assert uids(second_step(1).groups) == [2] and uids(second_step(2).groups) == [1]


@pytest.mark.parametrize("keeps", [True, False])
def test_groups_that_are_finished_when_a_signal_comes_are_trained_on_after_it_if_asked(collect, keeps):
    moves = []

    def interrupted(in_flight: list[int]) -> list[int]:
        moves.append(in_flight)
        if len(moves) == 4:
            raise KeyboardInterrupt
        return [max(in_flight)]

    options = dict(train=4, gen_batch_prompts=4, keep_rollouts=keeps)
    scripts = [MIXED, MIXED, WRONG, MIXED, MIXED, MIXED, MIXED]
    sampler, engine = collect(scripts, interrupted, **options)
    with pytest.raises(KeyboardInterrupt):
        sampler.collect(step=0)
    assert engine.submitted == [0, 1, 2, 3, 4, 5] and engine.cancelled == [0, 1, 4]
    if not keeps:
        assert sampler.rescued is None
        return
    loader, state = sampler.rescued
    assert (loader["offset"], uids(state.carried)) == (6, [3, 5])  # 2 does not vary
    resumed, engine = collect(scripts, one_by_one, taken=6, **options)
    packed, arrays = state.pack()
    prompts = {prompt.uid: prompt for prompt in make_prompts(*scripts)}
    assert resumed.load_state(json.loads(json.dumps(packed)), arrays, prompts) == ""
    assert uids(resumed.collect(step=0).groups) == [3, 5, 0, 1] and engine.submitted == [0, 1]
    assert resumed.state()[0]["again"] == ["train:4"]


def test_groups_in_flight_for_several_steps_are_asked_again_after_a_signal(collect):
    options = dict(train=2, max_in_flight_groups=4, max_staleness=2, keep_rollouts=True)
    sampler, engine = keeping(collect, [MIXED] * 12, one_by_one_last_first, **options)
    sampler.collect(step=1)
    waiting = pending(sampler)
    assert waiting
    engine.order = Mock(side_effect=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        sampler.collect(step=2)
    again = [int(prompt.uid.removeprefix("train:")) for prompt in sampler.rescued[1].again]
    assert again == sorted(engine.cancelled) and set(waiting) <= set(again)


@pytest.mark.parametrize("on_full", ["wait", "keep"])
@pytest.mark.parametrize("culprit", ["engine", "reward"])
def test_a_failure_ends_every_request(collect, culprit, on_full):
    broken = []

    def score(*args: object) -> list[Score]:
        if broken:
            raise RolloutError("broken")
        return reward(*args)

    options = dict(train=3, gen_batch_prompts=3, on_full=on_full)
    sampler, engine = collect([MIXED] * 9, one_by_one, reward=score, **options)
    sampler.collect(step=0)
    assert len(pending(sampler)) == (2 if on_full == "keep" else 0)

    if culprit == "reward":
        broken.append(True)
    else:
        engine.order = lambda in_flight: [engine.in_flight[in_flight[0]][0].set_exception(RolloutError("broken"))][:0]
    with pytest.raises(RolloutError, match="broken"):
        sampler.collect(step=1)
    futures = [future for future, *_ in engine.in_flight.values() if not future.cancelled()]
    assert all(future.done() for future in futures)


def test_a_step_expects_what_the_steps_before_have_seen(collect):
    """The configuration promises a third, but all are kept: of 16 imagined groups and 27 real ones that makes 32.3 / 43 for
    the second step, then 21.0 / 25, then 21.5 / 24."""
    options = dict(train=4, gen_batch_prompts=12, max_in_flight_groups=40, carry_surplus=False)
    sampler, engine = collect([MIXED] * 60, one_by_one, **options)
    begun = []
    for step in range(4):
        before = len(engine.submitted)
        sampler.collect(step)
        begun.append(len(engine.submitted) - before)
    # the fewest that bring 4 even if luck is two standard deviations bad: 26.6, 8.7, 7.1, 6.2
    assert begun == [27, 9, 8, 7]


class CountedVersion(int):
    """A weight version that counts how often versions are compared."""

    comparisons = 0

    def __lt__(self, other: int) -> bool:
        CountedVersion.comparisons += 1
        return int(self) < other

    def __le__(self, other: int) -> bool:
        CountedVersion.comparisons += 1
        return int(self) <= other


def test_the_work_of_a_step_grows_in_proportion_to_its_groups(collect):
    def comparisons(num_groups: int) -> int:
        sizes = dict(train=num_groups, max_in_flight_groups=num_groups, max_staleness=2)
        sampler, engine = keeping(collect, [MIXED] * 3 * num_groups, one_by_one_last_first, **sizes)
        CountedVersion.comparisons = 0
        for version in (1, 2):
            engine.weight_version = CountedVersion(version)
            sampler.collect(step=version)
        return CountedVersion.comparisons

    few, many = comparisons(40), comparisons(80)
    assert few > 40 and many < 2.2 * few  # a look at all groups for each that arrives would make it four times as many


class QuickEngine(ScriptedEngine):
    """Generates each group as soon as it is asked for. `after(n)` waits until n groups have been asked for."""

    def __init__(self, prompts: list[Prompt]):
        super().__init__(prompts)
        self.submitted: list[int] = []
        self._grown = threading.Condition()

    def submit(self, prompts: list[np.ndarray], params: SamplingParams) -> Future[list[Rollout]]:
        number = int(prompts[0][0])
        future: Future[list[Rollout]] = Future()
        future.set_result([self.respond(number) for _ in prompts])
        with self._grown:
            self.submitted.append(number)
            self._grown.notify_all()
        return future

    def after(self, count: int) -> bool:
        with self._grown:
            return self._grown.wait_for(lambda: len(self.submitted) >= count, timeout=10)


def quick(scripts: list[str], score: Callable[..., list[Score]], **sampling: object) -> tuple[Sampler, QuickEngine]:
    prompts = make_prompts(*scripts)
    engine = QuickEngine(prompts)
    config = make_config("filter", engine="sglang", **sampling)
    return Sampler(engine, PromptLoader(prompts, seed=0, shuffle=False), score, decode, config), engine


def test_a_slow_score_keeps_no_server_waiting_but_bounds_the_groups_without_scores():
    waits, most = [], []

    def score(*args: object) -> list[Score]:
        if not waits:
            waits.append(engine.after(6))  # 3 in flight, and 3 that took their place
        most.append(len(engine.submitted) - len(most))
        return reward(*args)

    options = dict(train=4, gen_batch_prompts=12, max_in_flight_groups=3)
    sampler, engine = quick([MIXED] * 40, score, **options)
    assert uids(sampler.collect(step=0).groups) == [0, 1, 2, 3]
    assert waits == [True] and most[0] == 6, "as many groups may lack scores as may be in flight"


@pytest.mark.parametrize("on_full", ["abort", "keep"])
@pytest.mark.parametrize("slow", [None, 0, 1, 3])
def test_how_long_a_score_takes_decides_nothing_about_a_step(on_full, slow):
    """Group 0 gives no gradient, so groups 1 to 3 fill the batch: the first that are generated."""
    scored: list[int] = []

    def score(prompts: list[Prompt], *args: object) -> list[Score]:
        scored.extend(int(prompt.token_ids[0]) for prompt in prompts)
        if slow in scored:
            assert engine.after(5)
        return reward(prompts, *args)

    options = dict(train=3, gen_batch_prompts=9, max_in_flight_groups=4, max_staleness=2, on_full=on_full)
    sampler, engine = quick([RIGHT] + [MIXED] * 60, score, **options)
    collected = sampler.collect(step=0)
    assert uids(collected.groups) == [1, 2, 3] and uids(collected.generated) == [0, 1, 2, 3]
    assert pending(sampler) == engine.submitted[4:]
