"""Prompts to scored responses."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest

from dapo_mcore.algo.advantage import group_advantages
from dapo_mcore.algo.filtering import group_varies
from dapo_mcore.batch.collate import to_train_batch
from dapo_mcore.config.reward import RewardConfig
from dapo_mcore.observe.metrics import group_metrics
from dapo_mcore.observe.progress import NullProgress
from dapo_mcore.observe.timing import PhaseTimer
from dapo_mcore.reward.scorer import build_reward
from dapo_mcore.rollout.sampling.respond import Responder
from dapo_mcore.types import Group, Rollout, SamplingParams, ToolCall
from tests.rollout.sampling.scripted import (
    MIXED,
    ScriptedEngine,
    decode,
    make_config,
    make_prompts,
    make_sampler,
    reward,
)

PARAMS = SamplingParams(temperature=1.0, top_p=1.0, top_k=-1, max_new_tokens=8, seed=0)


def test_each_prompt_gets_its_own_group_of_scored_responses_in_order():
    prompts = make_prompts("RW", "WR")
    engine = ScriptedEngine(prompts)
    first, second = Responder(engine, reward, decode).groups(prompts, size=2, params=PARAMS)
    assert [n for n, _ in engine.calls] == [4], "all groups in one call"
    assert (first.prompt, second.prompt) == (prompts[0], prompts[1])
    # response j has j + 1 tokens, and costs a penalty of 0.1 per token
    assert [sample.text for sample in first.samples] == ["R", "WW"]
    assert [sample.score.reward for sample in first.samples] == [0.9, -1.2]
    assert [sample.score.reward for sample in second.samples] == [-1.1, 0.8]


def test_a_response_with_a_log_prob_that_is_not_finite_is_masked_counted_and_named():
    prompts = make_prompts("R", "WR")
    engine = ScriptedEngine(prompts)
    generate = engine.generate

    def spoiled(*args: object) -> list[Rollout]:
        rollouts = generate(*args)
        rollouts[2] = replace(rollouts[2], logprobs=np.array([-np.inf], np.float32))
        rollouts[3] = replace(rollouts[3], logprobs=np.array([np.nan, -1.0], np.float32))
        return rollouts

    engine.generate = spoiled
    groups = Responder(engine, reward, decode).groups(prompts, size=2, params=PARAMS)
    assert [[sample.scored for sample in group.samples] for group in groups] == [[True, True], [False, False]]
    second = [sample.score for sample in groups[1].samples]
    assert [score.failure for score in second] == [
        "log-probs: 1 of 1 from the engine are not finite",
        "log-probs: 1 of 2 from the engine are not finite",
    ]
    assert not any(score.acc for score in second), "the right answer of a bad sample counts as none"
    batch = to_train_batch(groups, overlong_filter=False)
    assert np.isfinite(batch.rollout_logprobs).all() and batch.num_loss_tokens.tolist() == [1, 2, 0, 0]
    assert group_metrics(groups, groups)["reward/failures"] == 2


def test_only_log_probs_of_the_policys_tokens_must_be_finite():
    """A tool's output has none: what stands there is not read."""
    prompts, tokens = make_prompts("R"), np.array([82, 82, 82], np.int32)
    logprobs, mask = np.array([-1, np.nan, np.inf], np.float32), np.array([True, False, False])
    engine = ScriptedEngine(prompts)
    engine.generate = lambda *_: [
        Rollout(tokens, logprobs, mask, "stop", 1),
        Rollout(tokens, logprobs, ~mask, "stop", 1),
    ]
    (group,) = Responder(engine, reward, decode).groups(prompts, size=2, params=PARAMS)
    assert [sample.score.failure for sample in group.samples] == [
        None,
        "log-probs: 2 of 2 from the engine are not finite",
    ]
    batch = to_train_batch([group], overlong_filter=False)
    assert batch.rollout_logprobs.tolist() == [0, 0, -1, 0, 0] + [0] * 5


TOOL, POLICY = False, True


def used_tool(*parts: tuple[bool, str], kind: str = "ok") -> Rollout:
    """Return a response with one call and a token for each character of its parts."""
    tokens = np.array([ord(letter) for _, text in parts for letter in text], np.int32)
    mask = np.array([writer for writer, text in parts for _ in text])
    calls = (ToolCall("python", "3 + 4", kind, "the sandbox has failed twice", 0.1),)
    return Rollout(tokens, np.zeros(len(tokens), np.float32), mask, "stop", 1, num_turns=2, calls=calls)


def respond(*rollouts: Rollout) -> Group:
    """Return the group of these responses, scored as the configuration does by default."""
    prompt = replace(make_prompts("R")[0], answer="7")
    engine = ScriptedEngine([prompt])
    engine.generate = lambda *_: list(rollouts)
    (group,) = Responder(engine, build_reward(RewardConfig(), 64), decode).groups([prompt], len(rollouts), PARAMS)
    return group


def test_an_answer_that_only_a_tool_gave_is_wrong():
    found = respond(
        used_tool((POLICY, "Hm. "), (TOOL, "Answer: 7\n"), (POLICY, "So it is.")),
        used_tool((POLICY, "Hm. "), (TOOL, "Answer: 8\n"), (POLICY, "Answer: 7")),
        used_tool((POLICY, "Answer: 7"), (TOOL, "1"), (POLICY, "2")),
        used_tool((POLICY, "Answer: 7"), (TOOL, "Answer: 8")),
        used_tool((TOOL, "Answer: 7")),
    ).samples
    assert [sample.score.acc for sample in found] == [False, True, True, True, False]
    assert found[0].text == "Hm. Answer: 7\nSo it is.", "people see everything"


@pytest.mark.parametrize("num_lost", [4, 7])
def test_samples_that_lost_a_tool_leave_statistics_and_loss(num_lost: int):
    """All that is left of the group is trained on as if it were the whole group."""
    right, wrong = (used_tool((POLICY, text), (TOOL, "7")) for text in ("Answer: 7", "Answer: 8"))
    lost = used_tool((POLICY, "Answer: 7"), (TOOL, "?"), kind="infrastructure")
    good = [right, wrong, right, right][: 8 - num_lost]
    group = respond(*[lost] * (num_lost - 1), *good, lost)
    assert {sample.score.failure for sample in group.samples if not sample.scored} == {
        "tool: python: the sandbox has failed twice"
    }
    assert [sample.scored for sample in group.samples] == [False] * (num_lost - 1) + [True] * len(good) + [False]
    assert group_varies(group) == (len(good) == 4)
    whole, alone = (to_train_batch([one], overlong_filter=False) for one in (group, respond(*good)))
    assert whole.num_loss_tokens.tolist() == [0] * (num_lost - 1) + [9] * len(good) + [0]
    advantages = group_advantages(whole.rewards, whole.group_ids, whole.in_statistics)
    expected = group_advantages(alone.rewards, alone.group_ids, alone.in_statistics) if len(good) == 4 else [0.0]
    assert advantages.tolist() == [0.0] * (num_lost - 1) + list(expected) + [0.0]
    metrics = group_metrics([group], [group])
    assert (metrics["reward/failures"], metrics["reward/groups_one_scored"]) == (num_lost, float(len(good) == 1))
    assert metrics["reward/mean"] == np.mean([1.0, -1.0, 1.0, 1.0][: len(good)])


def test_an_engine_or_a_reward_that_loses_a_response_is_noticed():
    prompts = make_prompts("R", "R")
    engine = ScriptedEngine(prompts)
    with pytest.raises(AssertionError, match="reward returned 1 scores for 2 samples"):
        Responder(engine, lambda *args: reward(*args)[:1], decode).samples(prompts, PARAMS)
    engine.generate = lambda *_: []
    with pytest.raises(AssertionError, match="engine returned 0 rollouts for 2 prompts"):
        Responder(engine, reward, decode).samples(prompts, PARAMS)


def test_requests_extend_the_phase_while_a_step_waits_for_them():
    class Recorder(NullProgress):
        def phase(self, name: str, total: int | None = None) -> None:
            told.append((name, total))

        def more(self, n: int) -> None:
            told.append(n)

    told: list[object] = []
    timer = PhaseTimer(clock=iter([0.0, 1.0, 3.0, 5.0, 6.0, 9.0]).__next__)
    engine = ScriptedEngine([])
    engine.submit = lambda prompts, params: Future()
    responder = Responder(engine, reward, decode, Recorder(), timer)
    with responder.waiting():
        responder.expect(5)
        responder.submit(make_prompts("R", "W"), PARAMS)
        with responder.waiting_for_scores():
            pass
    assert told == [("generate", 0), 5, 2]
    assert timer.pop() == {"time/generate_s": 3.0, "time/reward_s": 2.0, "time/step_s": 9.0}


def test_generation_and_reward_are_timed_apart():
    ticks = iter(range(100))
    timer = PhaseTimer(clock=lambda: float(next(ticks)))
    sampler, _ = make_sampler(make_prompts(MIXED), make_config("none", train=1), timer=timer)
    sampler.collect(step=0)
    times = timer.pop()
    assert times["time/generate_s"] == 1.0 and times["time/reward_s"] == 1.0
