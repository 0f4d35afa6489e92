"""Many episodes at once: rounds on a batch engine, and episodes that overlap on a continuous one, also with servers that die."""

from __future__ import annotations

import os
import signal
from concurrent.futures import CancelledError, Future
from typing import Any

import numpy as np
import pytest

from dapo_mcore.data.loader import PromptLoader
from dapo_mcore.errors import RolloutError
from dapo_mcore.rollout.agent.engine import ContinuousToolEngine, RoundToolEngine
from dapo_mcore.rollout.agent.episode import Dialect
from dapo_mcore.rollout.sampling.sampler import Sampler
from dapo_mcore.types import ContinuousEngine, Prompt, Rollout, Score
from tests.rollout.agent.letters import (
    STOP,
    Angles,
    ContinuousPolicy,
    FiveTokens,
    ScriptedPolicy,
    codes,
    letters_dialect,
    spoken,
)
from tests.rollout.agent.talk import Kind, Result, StubTools, params, stopped
from tests.rollout.sampling.scripted import decode, make_config, reward
from tests.rollout.sglang.fake_server import fake_python
from tests.rollout.sglang.serving import FAST, SLOW, engine, pace, prompts, servers, told, wait_for, weights

SCRIPTS = {0: ["a(x)|b(y)|R."], 1: ["W."], 2: ["(z)|W."]}


def doubled(name: str, arguments: str) -> Result:
    return Result(Kind.OK, name * 2)


def asked(*numbers: int) -> list[np.ndarray]:
    return [np.array([number], np.int32) for number in numbers]


def texts(rollouts: list[Rollout]) -> list[str]:
    return [spoken(rollout.token_ids) for rollout in rollouts]


def last_letter(asked_prompts: Any, rollouts: Any, turns: list[list[str]]) -> list[Score]:
    return reward(asked_prompts, rollouts, [["".join(texts).rstrip(".")] for texts in turns])


def written(rollout: Rollout) -> str:
    return spoken(rollout.token_ids[rollout.loss_mask])


def wait(condition: Any) -> None:
    wait_for(condition, 60)


def test_a_round_generates_all_turns_in_one_batch_each_with_its_own_room():
    policy, tools = ScriptedPolicy(SCRIPTS), StubTools(doubled)
    made = RoundToolEngine(policy, tools, letters_dialect())
    done: list[int] = []
    made.on_progress = done.append
    rollouts = made.generate(asked(0, 1, 2), params(30))
    assert texts(rollouts) == ["a(x)[xx]b(y)[yy]R.", "W.", "(z)[zz]W."]
    assert [written(rollout) for rollout in rollouts] == ["a(x)b(y)R.", "W.", "(z)W."]
    assert [(r.num_turns, len(r.calls), r.finish_reason) for r in rollouts] == [
        (3, 2, "stop"),
        (1, 0, "stop"),
        (2, 1, "stop"),
    ]
    assert policy.rounds == [
        (["", "", ""], [30, 30, 30]),
        (["a(x)[xx]", "(z)[zz]"], [22, 23]),
        (["a(x)[xx]b(y)[yy]"], [14]),
    ]
    assert sum(done) == 3 and len(tools.closed) == 3 and len({session for session, *_ in tools.calls}) == 2
    assert made.metrics() == {"rollout/retries": 0.0, "rollout/tokens_cut": 0.0}


def test_calls_of_a_round_run_at_the_same_time_and_tokens_after_a_call_are_counted():
    class Patient(StubTools):
        def call(self, session: str, name: str, arguments: str, is_code: bool) -> Future[Any]:
            future = super().call(session, name, arguments, is_code)
            if len(self.begun) == 2:  # a call that was waited for first would never end
                for number, one in enumerate(self.begun):
                    one.set_result(Result(Kind.OK, str(number)))
            return future

    talk = letters_dialect()
    late = Dialect(talk.format, talk.tool_text, talk.decode, frozenset(), talk.max_turns)
    policy = ScriptedPolicy({0: ["(x)zzz.|R."], 2: ["(y).|W."]})
    policy.respond = _without_end_token(policy)
    made = RoundToolEngine(policy, Patient(), late)
    assert texts(made.generate(asked(0, 2), params(30))) == ["(x)[0]R.", "(y)[1]W."]
    assert made.metrics()["rollout/tokens_cut"] == 5
    assert made.metrics()["rollout/tokens_cut"] == 0


def _without_end_token(policy: ScriptedPolicy):
    def respond(tokens: np.ndarray, limit: int) -> Rollout:
        (script,) = policy.scripts[int(tokens[0])]
        turn = script.split("|")[spoken(tokens).count("]")]
        return stopped(codes(turn).tolist(), {STOP}, limit)

    return respond


def test_the_same_seed_gives_each_round_the_same_seeds():
    seeds = []
    policy = ScriptedPolicy(SCRIPTS)
    generate = policy.generate

    def noting(prompts, law, limits):
        seeds.append(law.seed)
        return generate(prompts, law, limits)

    policy.generate = noting
    made = RoundToolEngine(policy, StubTools(doubled), letters_dialect())
    made.generate(asked(0, 2), params(30, seed=5))
    made.generate(asked(0, 2), params(30, seed=5))
    made.generate(asked(0, 2), params(30, seed=6))
    assert len(set(seeds[:3])) == 3 and seeds[:3] == seeds[3:6] and not set(seeds[6:]) & set(seeds[:3])


def test_an_error_of_a_tool_ends_generation_and_closes_all_sessions():
    class Broken(StubTools):
        def call(self, session: str, name: str, arguments: str, is_code: bool) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_exception(RolloutError("no tool any more"))
            return future

    for kind, policy in ((RoundToolEngine, ScriptedPolicy(SCRIPTS)), (ContinuousToolEngine, ContinuousPolicy(SCRIPTS))):
        tools = Broken()
        made = kind(policy, tools, letters_dialect())
        with pytest.raises(RolloutError, match="no tool any more"):
            made.generate(asked(0, 1, 2), params())
        made.close()
        assert len(tools.closed) == 3


@pytest.fixture
def continuous():
    made: list[ContinuousToolEngine] = []

    def build(policy: Any, tools: StubTools, talk: Dialect | None = None) -> ContinuousToolEngine:
        made.append(ContinuousToolEngine(policy, tools, talk or letters_dialect()))
        return made[-1]

    yield build
    for one in made:
        one.close()


def test_an_episode_goes_on_while_the_tool_of_another_runs(continuous):
    policy, tools = ContinuousPolicy(SCRIPTS), StubTools()
    made = continuous(policy, tools)
    assert isinstance(made, ContinuousEngine) and not isinstance(
        RoundToolEngine(policy, tools, letters_dialect()), ContinuousEngine
    )
    first, second = made.submit(asked(0), params()), made.submit(asked(1, 2), params(seed=4))
    wait(lambda: len(tools.begun) == 2)
    by_name = {name: future for (_, name, _), future in zip(tools.calls, tools.begun)}
    by_name["z"].set_result(Result(Kind.OK, "late"))
    assert texts(second.result(60)) == ["W.", "(z)[late]W."]
    assert not first.done()
    by_name["x"].set_result(Result(Kind.OK, "1"))
    wait(lambda: len(tools.begun) == 3)
    tools.begun[-1].set_result(Result(Kind.OK, "2"))
    (rollout,) = first.result(60)
    assert spoken(rollout.token_ids) == "a(x)[1]b(y)[2]R."
    assert len({law.seed for law in policy.params}) == len(policy.params) == 6
    wait(lambda: len(tools.closed) == 3)


def test_cancelling_ends_requests_and_calls_and_closes_the_sessions(continuous):
    policy, tools = ContinuousPolicy(SCRIPTS, hold=lambda text: text == "(z)[zz]"), StubTools()
    made = continuous(policy, tools)
    calling, generating = made.submit(asked(0), params()), made.submit(asked(2), params())
    wait(lambda: len(tools.begun) == 2)
    next(f for (_, name, _), f in zip(tools.calls, tools.begun) if name == "z").set_result(Result(Kind.OK, "zz"))
    assert policy.held.acquire(timeout=60)
    assert calling.cancel() and generating.cancel()
    wait(lambda: len(tools.closed) == 2)
    call = next(f for (_, name, _), f in zip(tools.calls, tools.begun) if name == "x")
    assert call.cancelled()
    with pytest.raises(CancelledError):
        calling.result()


def test_a_request_that_the_engine_cancels_cancels_the_group(continuous):
    class Cancelling(ContinuousPolicy):
        def submit(self, prompts: Any, law: Any) -> Future[list[Rollout]]:
            if not self.cancelled:
                return super().submit(prompts, law)
            future: Future[list[Rollout]] = Future()
            future.cancel()
            return future

    policy, tools = Cancelling(SCRIPTS), StubTools()
    made = continuous(policy, tools)
    group = made.submit(asked(0, 2), params())
    wait(lambda: len(tools.begun) == 2)
    made.cancel_requests()
    tools.begun[0].set_result(Result(Kind.OK, "1"))
    with pytest.raises(CancelledError):
        group.result(60)
    assert tools.begun[1].cancelled()


def test_turns_may_be_of_different_weights(continuous):
    """As with sampling.on_full keep, where episodes go on after a sync."""
    policy, tools = ContinuousPolicy(SCRIPTS, version=3), StubTools()
    made = continuous(policy, tools)
    future = made.submit(asked(0), params())
    for number in (1, 2):
        wait(lambda number=number: len(tools.begun) == number)
        made.update_weights(iter(()), 3 + number)
        tools.begun[-1].set_result(Result(Kind.OK, "1"))
    (rollout,) = future.result(60)
    assert spoken(rollout.token_ids) == "a(x)[1]b(y)[1]R."
    assert (rollout.weight_version, rollout.version_spans) == (3, ((0, 3), (7, 4), (14, 5)))
    assert made.weight_version == 5


@pytest.mark.parametrize("kind", ["rounds", "continuous"])
@pytest.mark.parametrize("style", ["none", "filter", "resample"])
def test_groups_of_episodes_are_sampled_as_groups_of_responses(kind: str, style: str, continuous):
    """A group varies where one response finds the answer with its tool and another does not."""
    scripts = {0: ["(x)|R.", "b(x)|W.", "R."], 1: ["R."], 2: ["W."], 3: ["(y)|(x)|W.", "b(x)|R."], 4: ["(z)|R.", "W."]}
    rows = [Prompt(f"train:{number}", np.array([number], np.int32), "", "42") for number in scripts]
    config = make_config(
        style,
        train=2,
        engine="sglang" if kind == "continuous" else "embedded",
        gen_batch_prompts=5,
        max_samples_per_prompt=4,
    )
    policy = (ContinuousPolicy if kind == "continuous" else ScriptedPolicy)(scripts)
    made = (
        continuous(policy, StubTools(doubled))
        if kind == "continuous"
        else RoundToolEngine(policy, StubTools(doubled), letters_dialect())
    )

    sampler = Sampler(made, PromptLoader(rows, seed=0, shuffle=False), last_letter, decode, config)
    collected = sampler.collect(1)
    kept = {"none": [0, 1], "filter": [0, 3], "resample": [0, 3]}[style]
    assert [int(group.prompt.token_ids[0]) for group in collected.groups] == kept
    first = [sample.rollout for sample in collected.groups[0].samples]
    assert sorted(map(written, first))[:2] == ["(x)R.", "b(x)W."] and {rollout.num_turns for rollout in first} == {2}
    assert collected.stats["sampling/staleness_max"] == 0


def test_an_episode_whose_tool_is_slow_is_kept_for_the_next_step(continuous):
    """With sampling.on_full keep: its first turn is of the weights before the sync, its last of those after it."""
    policy, tools = ContinuousPolicy({0: ["(x)|R."], **{number: ["R."] for number in range(1, 8)}}), StubTools()
    made = continuous(policy, tools)
    rows = [Prompt(f"train:{number}", np.array([number], np.int32), "", "42") for number in range(8)]
    options = dict(on_full="keep", max_staleness=2, max_in_flight_groups=3)
    config = make_config("none", train=2, group_size=1, engine="sglang", **options)
    sampler = Sampler(made, PromptLoader(rows, seed=0, shuffle=False), last_letter, decode, config)
    first = sampler.collect(1)
    assert all(sample.rollout.num_turns == 1 for group in first.groups for sample in group.samples)
    (waiting,) = [group for group in sampler._pending if group.prompt is rows[0]]
    wait(lambda: tools.begun)
    made.update_weights(iter(()), 2)
    tools.begun[0].set_result(Result(Kind.OK, "1"))
    waiting.answer.scored.result(60)
    (kept,) = [group for group in sampler.collect(2).groups if group.prompt is rows[0]]
    (sample,) = kept.samples
    assert spoken(sample.rollout.token_ids) == "(x)[1]R." and sample.score.acc
    assert (sample.rollout.version_spans, kept.weight_version) == (((0, 1), (6, 2)), 1)


def test_a_server_killed_in_the_third_turn_costs_that_turn_alone(tmp_path, continuous):
    """A fake server repeats its input, so each turn shows what its server was asked."""
    talk = Dialect(FiveTokens(), Angles(), spoken, frozenset(), max_turns=4)
    tools = StubTools()
    with engine(tmp_path, num_servers=2, python=fake_python(tmp_path, tokens_per_s=FAST)) as made:
        made.update_weights(weights(0), version=1)
        answers = ContinuousToolEngine(made, tools, talk)
        future = answers.submit(prompts(8), params(60))
        for turn in (1, 2):
            wait(lambda turn=turn: len(tools.begun) == 8 * turn)
            if turn == 2:
                pace(made, SLOW)
            for one in tools.begun[8 * (turn - 1) :]:
                one.set_result(Result(Kind.OK, "\x05"))
        first = servers(made)[0]
        wait(lambda: told(first)["running"] > 0)
        os.kill(told(first)["pid"], signal.SIGKILL)
        pace(made, FAST)
        wait(lambda: len(tools.begun) == 24)
        for one in tools.begun[16:]:
            one.set_result(Result(Kind.OK, "\x05"))
        rollouts = future.result(60)
        assert made.metrics()["rollout/retries"] > 0
        answers.stop()
    for rollout, prompt in zip(rollouts, prompts(8), strict=True):
        turn = np.resize(prompt, 5).tolist()
        tool = [60, 5, 62]
        assert rollout.token_ids.tolist() == [*turn, *tool, *turn, *tool, *turn, *tool, *turn]
        assert (rollout.num_turns, len(rollout.calls), rollout.finish_reason) == (4, 3, "length")
        assert rollout.loss_mask.sum() == 20 and rollout.weight_version == 1
