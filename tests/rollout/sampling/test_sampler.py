"""Which groups a step trains on: surplus carried from step to step, too few groups, and the state that a resumed run needs.

The engine and the meaning of the prompts' letters: scripted.py. What one round generates: test_rounds.py.
"""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from dapo_mcore.errors import RolloutError
from tests.rollout.sampling.scripted import MIXED, RIGHT, WRONG, make_config, make_prompts, make_sampler, uids


def test_surplus_is_trained_on_in_the_next_step_before_anything_new():
    sampler, engine = make_sampler(make_prompts(*[MIXED] * 8), make_config("filter", train=2, gen_batch_prompts=3))
    first = sampler.collect(step=0)
    assert uids(first.groups) == [0, 1] and first.stats["sampling/surplus_carried"] == 1
    engine.weight_version = 2
    second = sampler.collect(step=1)
    assert uids(second.groups) == [2, 3] and uids(second.generated) == [3, 4, 5]
    assert [group.weight_version for group in second.groups] == [1, 2]
    assert second.stats["sampling/surplus_reused"] == 1 and second.stats["sampling/surplus_carried"] == 2
    calls = len(engine.calls)
    third = sampler.collect(step=2)
    assert uids(third.groups) == [4, 5] and third.generated == [] and len(engine.calls) == calls
    assert third.stats["sampling/surplus_carried"] == 0 and np.isnan(third.stats["sampling/kept_ratio"])


@pytest.mark.parametrize(
    ("max_staleness", "versions_later", "fresh"), [(0, 0, True), (0, 1, False), (2, 2, True), (2, 3, False)]
)
def test_surplus_is_dropped_once_too_stale(max_staleness, versions_later, fresh):
    config = make_config("filter", train=1, gen_batch_prompts=2, max_staleness=max_staleness)
    sampler, engine = make_sampler(make_prompts(*[MIXED] * 4), config)
    sampler.collect(step=0)
    engine.weight_version += versions_later
    collected = sampler.collect(step=1)
    assert uids(collected.groups) == ([1] if fresh else [2])
    assert collected.stats["sampling/surplus_dropped"] == collected.stats["sampling/groups_stale"] == (not fresh)
    assert collected.stats["sampling/staleness_max"] == (versions_later if fresh else 0)
    assert collected.stats["sampling/surplus_reused"] == fresh


def test_surplus_can_be_thrown_away_as_verl_does():
    config = make_config("filter", train=1, gen_batch_prompts=3, carry_surplus=False)
    sampler, _ = make_sampler(make_prompts(*[MIXED] * 6), config)
    stats = sampler.collect(step=0).stats
    assert stats["sampling/surplus_dropped"] == 2 and stats["sampling/surplus_carried"] == 0
    assert uids(sampler.collect(step=1).groups) == [3]


def test_whole_rounds_are_kept_when_a_signal_ends_the_next_one():
    scripts = [MIXED, WRONG, MIXED, MIXED, MIXED]
    sampler, engine = make_sampler(
        make_prompts(*scripts), make_config("filter", train=3, gen_batch_prompts=2, keep_rollouts=True)
    )
    generate = engine.generate

    def interrupted(prompts, params):
        if engine.calls:
            raise KeyboardInterrupt
        return generate(prompts, params)

    engine.generate = interrupted
    with pytest.raises(KeyboardInterrupt):
        sampler.collect(step=0)
    loader, state = sampler.rescued
    assert (loader["offset"], uids(state.carried)) == (4, [0])
    assert [prompt.uid for prompt in state.again] == ["train:2", "train:3"]


def test_no_good_group_is_lost_or_trained_on_twice():
    scripts = [MIXED if i % 3 else RIGHT for i in range(60)]
    sampler, _ = make_sampler(make_prompts(*scripts), make_config("filter", train=3, gen_batch_prompts=5))
    steps = [sampler.collect(step) for step in range(9)]
    trained = Counter(uid for step in steps for uid in uids(step.groups))
    generated = [uid for step in steps for uid in uids(step.generated)]
    good = {uid for uid in generated if scripts[uid] == MIXED}
    still_carried = [group["uid"] for group in sampler.state()[0]["groups"]]
    assert generated == sorted(set(generated)), "each prompt is generated once, in order"
    assert set(trained.values()) == {1}
    assert set(trained) | {int(uid.removeprefix("train:")) for uid in still_carried} == good
    assert len(still_carried) == steps[-1].stats["sampling/surplus_carried"] > 0


@pytest.mark.parametrize("style", ["filter", "resample"])
def test_exhausted_names_the_numbers(style):
    config = make_config(style, train=2, gen_batch_prompts=2, max_gen_batches=3, max_samples_per_prompt=4)
    sampler, _ = make_sampler(make_prompts(MIXED, RIGHT, *[WRONG] * 8), config)
    with pytest.raises(
        RolloutError, match=r"1 of sampling.train_batch_prompts 2 .*max_gen_batches 3 .*: 1 varied, 1 all right"
    ):
        sampler.collect(step=0)


def test_exhausted_may_train_on_what_there_is():
    config = make_config(
        "filter", train=2, gen_batch_prompts=2, max_gen_batches=2, on_exhausted="train_on_what_we_have"
    )
    sampler, engine = make_sampler(make_prompts(MIXED, RIGHT, WRONG, WRONG, MIXED), config)
    collected = sampler.collect(step=0)
    assert uids(collected.groups) == [0] and len(engine.calls) == 2


def test_no_group_at_all_is_always_an_error():
    config = make_config(
        "filter", train=2, gen_batch_prompts=2, max_gen_batches=2, on_exhausted="train_on_what_we_have"
    )
    sampler, _ = make_sampler(make_prompts(WRONG), config)
    with pytest.raises(RolloutError, match=r"0 of .* 4 all wrong, 0 without any score\); .*check the reward function"):
        sampler.collect(step=0)


def test_state_round_trip_continues_exactly():
    prompts = make_prompts(*[MIXED, "FRW", RIGHT] * 6)
    config = make_config("filter", train=2, group_size=3, gen_batch_prompts=6)
    sampler, _ = make_sampler(prompts, config)
    sampler.collect(step=0)
    state, arrays = sampler.state()
    assert len(state["groups"]) == 2

    resumed, _ = make_sampler(prompts, config)
    resumed.load_state(json.loads(json.dumps(state)), arrays, {prompt.uid: prompt for prompt in prompts})
    again_state, again_arrays = resumed.state()
    assert again_state == state
    assert {name: array.dtype for name, array in arrays.items()} == {
        "token_ids": np.int32, "logprobs": np.float32, "loss_mask": np.bool_, "offsets": np.int64,
    }  # fmt: skip
    for name, array in arrays.items():
        np.testing.assert_array_equal(again_arrays[name], array)
    ours, theirs = resumed.collect(step=1).groups, sampler.collect(step=1).groups
    assert uids(ours) == uids(theirs) == [3, 4]
    for left, right in zip(ours, theirs):
        assert left.prompt is right.prompt
        for a, b in zip(left.samples, right.samples):
            assert (a.text, a.score) == (b.text, b.score)
            np.testing.assert_array_equal(a.rollout.logprobs, b.rollout.logprobs)


def test_an_empty_state_round_trips():
    sampler, _ = make_sampler(make_prompts(MIXED), make_config("none", train=1))
    state, arrays = sampler.state()
    sampler.load_state(json.loads(json.dumps(state)), arrays, {})
    assert uids(sampler.collect(step=0).groups) == [0]


def test_work_on_prompts_that_left_the_data_is_dropped_and_counted():
    prompts = make_prompts(*[MIXED] * 4)
    config = make_config("filter", train=1, gen_batch_prompts=4)
    sampler, _ = make_sampler(prompts, config)
    sampler.collect(step=0)
    state, arrays = sampler.state()
    assert [group["uid"] for group in state["groups"]] == ["train:1", "train:2", "train:3"]
    state["again"] = ["train:1", "train:0"]
    resumed, _ = make_sampler(prompts, config)
    line = resumed.load_state(state, arrays, {prompt.uid: prompt for prompt in (prompts[0], prompts[2])})
    assert line.startswith(
        "2 of 3 carried groups and 1 of 2 prompts to generate again dropped: the training data no longer contain their prompts"
    )
    (kept,), (theirs,) = (
        resumed.collect(step=1).groups,
        [g for g in sampler.snapshot().carried if g.prompt is prompts[2]],
    )
    assert kept.prompt is prompts[2]
    for ours, other in zip(kept.samples, theirs.samples, strict=True):
        np.testing.assert_array_equal(ours.rollout.logprobs, other.rollout.logprobs)
        assert ours.text == other.text
    assert resumed.load_state(*resumed.state(), {prompt.uid: prompt for prompt in prompts}) == ""
