"""Runs of whole epochs: every prompt once per epoch, whatever is filtered out, and nothing lost at the end."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from dapo_mcore.data.loader import PromptLoader
from dapo_mcore.errors import ConfigError
from dapo_mcore.observe.progress import NullProgress
from dapo_mcore.rollout.sampling.length import RunLength, check_length, describe_length, most_steps
from dapo_mcore.rollout.sampling.sampler import NothingVaries, Sampler
from tests.rollout.sampling.scripted import (
    MIXED,
    RIGHT,
    WRONG,
    ScriptedEngine,
    decode,
    make_config,
    make_prompts,
    reward,
    uids,
)


class Lines(NullProgress):
    def __init__(self) -> None:
        self.lines, self.expected = [], []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def expect(self, num_steps: int, is_exact: bool) -> None:
        self.expected.append((num_steps, is_exact))


def with_epochs(num_epochs: int, style: str, train: int, **sampling):
    config = make_config(style, train, **sampling)
    return config.model_copy(update={"num_epochs": num_epochs, "num_rollout_steps": None})


def make(config, scripts: list[str]) -> tuple[Sampler, ScriptedEngine]:
    prompts = make_prompts(*scripts)
    engine = ScriptedEngine(prompts)
    loader = PromptLoader(prompts, seed=0, shuffle=False, num_epochs=config.num_epochs)
    return Sampler(engine, loader, reward, decode, config), engine


def play(config, scripts: list[str], stop_after: int | None = None, resumed=None):
    """Return the groups' numbers of each step, those that were generated, and what was said."""
    sampler, engine = make(config, scripts)
    shown = Lines()
    length, step, trained, generated = RunLength(config, len(scripts), shown), 0, [], Counter()
    if resumed is not None:
        step, loader, (state, arrays), engine._asked = resumed
        sampler._loader.load_state(loader)
        sampler.load_state(state, arrays, {p.uid: p for p in make_prompts(*scripts)})
        engine.weight_version += step
        length.look_ahead(step, sampler.num_left)
    while length.goes_on_after(step) and step != stop_after:
        step += 1
        collected = sampler.collect(step)
        generated.update(uids(collected.generated))
        engine.weight_version += 1
        if not collected.groups:
            length.end_before(step, collected)
            break
        trained.append(uids(collected.groups))
        length.look_ahead(step, sampler.num_left, collected)
    stored = json.loads(json.dumps(sampler._loader.state())), sampler.state()
    return trained, generated, shown, (step, *stored, engine._asked)


def test_without_filtering_the_number_of_steps_is_exact_and_the_last_one_has_the_rest():
    """2 × 7 prompts in steps of 4: 4 + 4 + 4 + 2."""
    trained, generated, shown, _ = play(with_epochs(2, "none", 4), [MIXED, WRONG, RIGHT] * 2 + [MIXED])
    assert trained == [[0, 1, 2, 3], [4, 5, 6, 0], [1, 2, 3, 4], [5, 6]]
    assert generated == dict.fromkeys(range(7), 2)
    assert shown.lines == [
        "num_epochs 2 × 7 prompts: 4 rollout steps, 16 gradient steps at most",
        "num_epochs 2 is over: rollout step 4 is the last, with 2 of sampling.train_batch_prompts 4 groups",
    ]
    assert shown.expected == [(4, True)] * 5


def test_with_filtering_every_prompt_is_asked_once_and_every_good_group_trained_on_once():
    """Of 8 prompts 5 vary (0 2 3 5 7). Batches of 3 give 0 2 | 3 5 | 7, and steps of 2: the surplus is carried, and 7 is left."""
    scripts = [MIXED, WRONG, MIXED, MIXED, RIGHT, MIXED, WRONG, MIXED]
    trained, generated, shown, _ = play(with_epochs(1, "filter", 2, gen_batch_prompts=3), scripts)
    assert trained == [[0, 2], [3, 5], [7]]
    assert generated == dict.fromkeys(range(8), 1)
    assert shown.expected == [(4, False), (4, False), (3 + 0, False), (3, False)]
    assert shown.lines[0] == "num_epochs 1 × 8 prompts: at most 4 rollout steps, fewer as groups are filtered out"


def test_carried_surplus_is_trained_on_after_the_last_prompt():
    """One batch of 5 gives all groups; three steps train on them."""
    config = with_epochs(1, "filter", 2, gen_batch_prompts=5, max_staleness=2)
    trained, generated, shown, _ = play(config, [MIXED] * 5)
    assert trained == [[0, 1], [2, 3], [4]] and generated == dict.fromkeys(range(5), 1)
    assert "rollout step 3 is the last, with 1 of sampling.train_batch_prompts 2 groups" in shown.lines[-1]


def test_surplus_that_is_thrown_away_at_the_end_is_told():
    config = with_epochs(1, "filter", 2, gen_batch_prompts=5, carry_surplus=False)
    trained, _, shown, _ = play(config, [MIXED] * 5)
    assert trained == [[0, 1]]
    assert shown.lines[-1].endswith("; 3 more were dropped (too old, or sampling.carry_surplus false)")


def test_last_prompts_without_a_group_to_train_on_end_the_run_with_the_step_before():
    trained, generated, shown, _ = play(
        with_epochs(1, "filter", 2, gen_batch_prompts=2), [MIXED, MIXED, WRONG, RIGHT, WRONG]
    )
    assert trained == [[0, 1]] and generated == dict.fromkeys(range(5), 1)
    assert shown.lines[-1] == (
        "num_epochs 1 is over, and none of the last 3 groups is left to train on (1 all right, 2 all wrong, 0 too old); the run "
        "ends with rollout step 1"
    )


def test_carried_groups_that_are_too_old_count_among_the_last():
    config = with_epochs(1, "filter", 2, gen_batch_prompts=5, max_staleness=0)
    trained, _, shown, _ = play(config, [MIXED] * 5)
    assert trained == [[0, 1]]
    assert "none of the last 3 groups is left to train on (0 all right, 0 all wrong, 3 too old)" in shown.lines[-1]


def test_data_without_any_group_to_train_on_are_an_error():
    with pytest.raises(NothingVaries, match=r"2 all wrong, 0 too old.*check the reward function"):
        play(with_epochs(1, "filter", 2, gen_batch_prompts=2), [WRONG, WRONG])


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_a_run_that_is_stopped_in_the_middle_of_an_epoch_goes_on_as_if_it_had_not_been(after):
    config = with_epochs(3, "filter", 2, gen_batch_prompts=3)
    again = MIXED * 3  # once per epoch
    scripts = [again, WRONG, again, again, RIGHT]
    whole, generated, _, _ = play(config, scripts)
    first, begun, _, stored = play(config, scripts, stop_after=after)
    rest, more, _, _ = play(config, scripts, resumed=stored)
    assert whole == [[0, 2], [3, 0], [2, 3], [0, 2], [3]]
    assert first + rest == whole and begun + more == generated == dict.fromkeys(range(5), 3)


def test_the_bound_holds_where_steps_end_early():
    """A step that gives up after 2 batches of 3 prompts takes 6 of them, fewer than the 10 groups that it wants."""
    config = with_epochs(1, "filter", 10, gen_batch_prompts=3, max_gen_batches=2)
    assert (most_steps(60, config.sampling), most_steps(61, config.sampling), most_steps(0, config.sampling)) == (
        10,
        11,
        0,
    )
    assert most_steps(61, make_config("resample", 10).sampling) == 7


def test_settings_about_steps_that_cannot_be_are_refused_when_the_data_are_known():
    config = with_epochs(2, "none", 4)
    check_length(config, num_prompts=7)
    assert describe_length(config, 2_000)[0].startswith("num_epochs 2 × 2,000 prompts: 1,000 rollout steps")
    late = config.model_copy(update={"observe": config.observe.model_copy(update={"profile_steps": [2, 5]})})
    with pytest.raises(ConfigError, match="profile_steps has 5, but num_epochs 2 × 7 prompts give at most 4 rollout"):
        check_length(late, num_prompts=7)
    warm = config.model_copy(update={"critic": config.critic.model_copy(update={"warmup_steps": 4})})
    with pytest.raises(ConfigError, match=r"critic.warmup_steps 4 leaves none.*use at most 3"):
        check_length(warm, num_prompts=7)


def test_where_the_cosine_ends_is_told_against_the_number_of_steps():
    """A step of 4 groups has 4 gradient steps."""
    config = with_epochs(2, "filter", 4, gen_batch_prompts=8, carry_surplus=False)
    optimizer = {"schedule": "cosine", "decay_updates": 12, "warmup_updates": 0}
    cosine = config.model_copy(update={"optimizer": config.optimizer.model_copy(update=optimizer)})
    assert describe_length(cosine, num_prompts=7) == [
        "num_epochs 2 × 7 prompts: at most 4 rollout steps, fewer as groups are filtered out or dropped (sampling.carry_surplus false)",
        "the cosine ends after 3 of at most 4 rollout steps",
    ]
    assert describe_length(cosine, num_prompts=4)[1] == (
        "the cosine of 3 rollout steps is longer than the run of at most 2 rollout steps, which ends above min_lr"
    )
    assert len(describe_length(config, num_prompts=7)) == 1, "a constant schedule has no end"


def test_a_run_of_steps_knows_its_end_and_says_nothing():
    shown = Lines()
    length = RunLength(make_config("none", 4), 7, shown)
    length.look_ahead(5, float("inf"))
    assert (length.last_step, length.goes_on_after(99), length.goes_on_after(100)) == (100, True, False)
    assert shown.lines == shown.expected == []
