"""What a round generates in each sampling style, with the scripted engine of scripted.py."""

from __future__ import annotations

import pytest

from dapo_mcore.errors import RewardError
from tests.rollout.sampling.scripted import MIXED, RIGHT, WRONG, letters, make_config, make_prompts, make_sampler, uids


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
    with pytest.raises(
        RewardError, match=r"none of the \d samples of rollout step 4 has a score; the first: timeout; .*math_dapo"
    ):
        sampler.collect(step=4)
    assert sum(n for n, _ in engine.calls) == (6 if style == "resample" else 4)


def test_one_score_in_a_step_is_enough_to_go_on():
    sampler, _ = make_sampler(make_prompts("F", "FW"), make_config("none", train=2))
    assert [letters(group) for group in sampler.collect(step=0).groups] == ["FF", "FW"]


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
