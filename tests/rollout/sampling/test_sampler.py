"""Dynamic sampling with a scripted engine: a prompt's text says how its responses turn out, one letter a response.

`RW` answers right, then wrong, then repeats the last letter; `F` fails to score. Responses get longer with each sample,
so that the overlong penalty varies inside every group.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict

import numpy as np
import pytest

from dapo_mcore.config.schema import Config
from dapo_mcore.data.loader import PromptLoader
from dapo_mcore.errors import RewardError, RolloutError
from dapo_mcore.observe.timing import PhaseTimer
from dapo_mcore.rollout.sampling.sampler import Sampler
from dapo_mcore.types import Group, Prompt, Rollout, SamplingParams, Score


class ScriptedEngine:
    """Response j to a prompt has j + 1 tokens; the last one is the letter of its script."""

    def __init__(self, prompts: list[Prompt], version: int = 1):
        self.weight_version = version
        self.calls: list[tuple[int, SamplingParams]] = []
        self._scripts = {int(prompt.token_ids[0]): prompt.text for prompt in prompts}
        self._asked: dict[int, int] = defaultdict(int)

    def generate(self, prompts: list[np.ndarray], params: SamplingParams) -> list[Rollout]:
        self.calls.append((len(prompts), params))
        return [self._respond(int(prompt[0])) for prompt in prompts]

    weights_lost = False

    def cancel_requests(self) -> None: ...

    def update_weights(self, weights: object, version: int) -> None: ...

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None: ...

    def _respond(self, prompt: int) -> Rollout:
        script, index = self._scripts[prompt], self._asked[prompt]
        self._asked[prompt] += 1
        tokens = np.full(index + 1, ord(script[min(index, len(script) - 1)]), dtype=np.int32)
        logprobs = -np.arange(1, index + 2, dtype=np.float32) / 3
        return Rollout(tokens, logprobs, np.ones(index + 1, dtype=bool), "stop", self.weight_version)


def decode(token_ids: np.ndarray) -> str:
    return "".join(map(chr, token_ids))


def reward(prompts, rollouts, texts) -> list[Score]:
    return [_score(len(text), text[-1]) for text in texts]


def _score(length: int, letter: str) -> Score:
    if letter == "F":
        return Score(reward=0.0, score=0.0, acc=False, failure="timeout", masked=True)
    raw, penalty = (1.0 if letter == "R" else -1.0), -0.1 * length
    return Score(reward=raw + penalty, score=raw, acc=letter == "R", penalty=penalty, pred=letter)


def make_prompts(*scripts: str) -> list[Prompt]:
    return [
        Prompt(f"train:{i}", np.array([i, 7], dtype=np.int32), script, "42", extra={"row": [i]})
        for i, script in enumerate(scripts)
    ]


def make_config(
    style: str, train: int, group_size: int = 2, seed: int = 0, engine: str = "embedded", **sampling
) -> Config:
    return Config.model_validate(
        {
            "seed": seed,
            "model": {"path": "unused"},
            "data": {"files": ["unused"]},
            "rollout": {
                "engine": engine,
                "group_size": group_size,
                "temperature": 0.9,
                "top_p": 0.8,
                "max_response_tokens": 64,
            },
            "sampling": {"style": style, "train_batch_prompts": train, **sampling},
            "batch": {"mini_batch_prompts": 1},
            "algo": {"old_logprobs": "rollout"},
        }
    )


def make_sampler(prompts: list[Prompt], config: Config, **options) -> tuple[Sampler, ScriptedEngine]:
    engine = ScriptedEngine(prompts)
    return Sampler(engine, PromptLoader(prompts, seed=0, shuffle=False), reward, decode, config, **options), engine


def uids(groups: list[Group]) -> list[int]:
    return [int(group.prompt.uid.removeprefix("train:")) for group in groups]


def letters(group: Group) -> str:
    return "".join(sample.text[-1] for sample in group.samples)


MIXED, RIGHT, WRONG = "RW", "RR", "WW"


def test_none_takes_groups_as_they_come():
    sampler, engine = make_sampler(make_prompts(RIGHT, MIXED, WRONG, MIXED), make_config("none", train=3))
    collected = sampler.collect(step=0)
    assert uids(collected.groups) == uids(collected.generated) == [0, 1, 2]
    assert [letters(group) for group in collected.groups] == ["RR", "RW", "WW"]
    assert [n for n, _ in engine.calls] == [6]
    assert collected.stats == {
        "sampling/groups_generated": 3,
        "sampling/groups_kept": 3,
        "sampling/groups_all_right": 1,
        "sampling/groups_all_wrong": 1,
        "sampling/kept_ratio": pytest.approx(1 / 3),
        "sampling/gen_batches": 1,
        "sampling/surplus_reused": 0,
        "sampling/surplus_carried": 0,
        "sampling/surplus_dropped": 0,
        "sampling/resample_rate": 0,
        "sampling/samples_generated": 6,
        "sampling/generated_tokens": 9,
        "sampling/groups_stale": 0,
        "sampling/staleness_mean": 0,
        "sampling/staleness_max": 0,
        "sampling/token_staleness_mean": 0,
        "sampling/samples_resumed": 0,
    }


def test_the_engine_gets_the_configured_law():
    sampler, engine = make_sampler(make_prompts(MIXED), make_config("none", train=1))
    sampler.collect(step=0)
    params = engine.calls[0][1]
    assert (params.temperature, params.top_p, params.top_k, params.max_new_tokens) == (0.9, 0.8, -1, 64)


def test_filter_refills_until_enough_groups_vary_and_keeps_prompt_order():
    prompts = make_prompts(RIGHT, MIXED, WRONG, WRONG, RIGHT, MIXED, MIXED, WRONG)
    sampler, engine = make_sampler(prompts, make_config("filter", train=3, gen_batch_prompts=4))
    collected = sampler.collect(step=0)
    assert uids(collected.groups) == [1, 5, 6]
    assert uids(collected.generated) == list(range(8))
    assert [n for n, _ in engine.calls] == [8, 8]
    stats = collected.stats
    assert stats["sampling/gen_batches"] == 2 and stats["sampling/groups_kept"] == 3
    assert stats["sampling/groups_all_right"] == 2 and stats["sampling/groups_all_wrong"] == 3
    assert stats["sampling/kept_ratio"] == 3 / 8 and stats["sampling/surplus_carried"] == 0


def test_filter_looks_at_raw_correctness_not_at_the_penalised_reward():
    sampler, _ = make_sampler(make_prompts(WRONG, MIXED), make_config("filter", train=1, gen_batch_prompts=2))
    collected = sampler.collect(step=0)
    wrong = collected.generated[0]
    assert len({sample.score.reward for sample in wrong.samples}) == 2, "the shaped reward must vary for this test"
    assert uids(collected.groups) == [1]


def test_failed_scores_do_not_make_a_group_vary():
    sampler, _ = make_sampler(make_prompts("RF", "FF", MIXED), make_config("filter", train=1, gen_batch_prompts=3))
    collected = sampler.collect(step=0)
    assert uids(collected.groups) == [2]
    assert collected.stats["sampling/groups_all_right"] == 1 and collected.stats["sampling/groups_all_wrong"] == 0


@pytest.mark.parametrize("style", ["none", "filter", "resample"])
def test_a_reward_that_fails_on_every_sample_ends_the_run_after_one_round(style):
    config = make_config(style, train=2, gen_batch_prompts=2, max_gen_batches=9, max_samples_per_prompt=3)
    sampler, engine = make_sampler(make_prompts("F", "F", "RW", "RW"), config)
    with pytest.raises(RewardError, match=r"math_dapo failed on all \d samples of rollout step 4; the first: timeout"):
        sampler.collect(step=4)
    assert sum(n for n, _ in engine.calls) == (6 if style == "resample" else 4)


def test_one_score_in_a_step_is_enough_to_go_on():
    sampler, _ = make_sampler(make_prompts("F", "FW"), make_config("none", train=2))
    assert [letters(group) for group in sampler.collect(step=0).groups] == ["FF", "FW"]


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


def test_resample_enlarges_uniform_groups_until_they_vary():
    prompts = make_prompts("RRRRW", MIXED, "WWWR")
    config = make_config("resample", train=3, resample_size=1, max_samples_per_prompt=6)
    sampler, engine = make_sampler(prompts, config)
    collected = sampler.collect(step=0)
    assert [letters(group) for group in collected.groups] == ["RRRRW", "RW", "WWWR"]
    assert collected.generated == collected.groups
    # groups 0 and 2 grow together, two rounds; then group 0 alone
    assert [n for n, _ in engine.calls] == [6, 2, 2, 1]
    assert collected.stats["sampling/samples_generated"] == 11
    assert collected.stats["sampling/resample_rate"] == pytest.approx(5 / 11)
    assert collected.stats["sampling/gen_batches"] == 1


def test_resample_gives_up_at_the_limit_and_refills_with_new_prompts():
    prompts = make_prompts("R", MIXED, "W", MIXED, MIXED)
    config = make_config("resample", train=3, resample_size=2, max_samples_per_prompt=5, max_gen_batches=4)
    sampler, engine = make_sampler(prompts, config)
    collected = sampler.collect(step=0)
    assert uids(collected.groups) == [1, 3, 4]
    assert {uid: len(group.samples) for uid, group in zip(uids(collected.generated), collected.generated)} == {
        0: 5, 1: 2, 2: 5, 3: 2, 4: 2,
    }  # fmt: skip
    assert [n for n, _ in engine.calls] == [6, 4, 2, 4]
    assert collected.stats["sampling/gen_batches"] == 2
    assert (collected.stats["sampling/groups_all_right"], collected.stats["sampling/groups_all_wrong"]) == (1, 1)


def test_resample_may_start_from_one_response():
    config = make_config("resample", train=2, group_size=1, max_samples_per_prompt=4)
    sampler, _ = make_sampler(make_prompts("RRW", "WR"), config)
    assert [letters(group) for group in sampler.collect(step=0).groups] == ["RRW", "WR"]


def test_every_call_has_its_own_repeatable_seed():
    def seeds(config_seed: int) -> list[int]:
        config = make_config("filter", train=1, gen_batch_prompts=1, seed=config_seed)
        sampler, engine = make_sampler(make_prompts(*[WRONG, MIXED] * 3), config)
        for step in range(3):
            sampler.collect(step)
        return [params.seed for _, params in engine.calls]

    assert len(seeds(0)) == 6 == len(set(seeds(0)))
    assert seeds(0) == seeds(0)
    assert not set(seeds(0)) & set(seeds(1))
    assert seeds(2**63 - 1) == seeds(2**63 - 1)


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
    (kept,), (theirs,) = resumed.collect(step=1).groups, [g for g in sampler._carried if g.prompt is prompts[2]]
    assert kept.prompt is prompts[2]
    for ours, other in zip(kept.samples, theirs.samples, strict=True):
        np.testing.assert_array_equal(ours.rollout.logprobs, other.rollout.logprobs)
        assert ours.text == other.text
    assert resumed.load_state(*resumed.state(), {prompt.uid: prompt for prompt in prompts}) == ""


def test_generation_and_reward_are_timed_apart():
    ticks = iter(range(100))
    timer = PhaseTimer(clock=lambda: float(next(ticks)))
    sampler, _ = make_sampler(make_prompts(MIXED), make_config("none", train=1), timer=timer)
    sampler.collect(step=0)
    times = timer.pop()
    assert times["time/generate_s"] == 1.0 and times["time/reward_s"] == 1.0
