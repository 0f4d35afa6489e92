"""Scores: reward = score + penalty, raw correctness, and the score of a failure."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dapo_mcore.config.reward import RewardConfig
from dapo_mcore.config.schema import Config
from dapo_mcore.errors import RewardError
from dapo_mcore.reward.scorer import build_reward, build_set_rewards
from dapo_mcore.types import Prompt, Rollout, Score, ToolCall

ZOO = Path(__file__).with_name("plugin_zoo.py")
OVERLONG = {"penalty": True, "cache": 8}


def rollout(length: int) -> Rollout:
    """Return a rollout of which the policy wrote `length` tokens; a tool wrote as many between them."""
    written = np.arange(2 * length) % 2 == 0
    return Rollout(np.zeros(2 * length, np.int32), np.zeros(2 * length, np.float32), written, "stop", 0)


def score(*responses: str, lengths: tuple[int, ...] = (), max_response_tokens: int = 16, **config) -> list[Score]:
    prompt = Prompt("t:0", np.zeros(1, np.int32), "q", "7", "set", {"level": 3})
    reward = build_reward(RewardConfig(**config), max_response_tokens)
    try:
        rollouts = [rollout(length) for length in lengths or [4] * len(responses)]
        return reward([prompt] * len(responses), rollouts, [[response] for response in responses])
    finally:
        reward.close()
        reward.close()


def test_sets_with_the_same_function_share_its_workers():
    sets = {name: {"files": "f"} for name in ("plain", "same", "boxed", "too")}
    sets["same"]["reward_function"] = "math_dapo"
    for name in ("boxed", "too"):
        sets[name]["reward_function"] = "math_boxed"
    tree = {"model": {"path": "m"}, "data": {"files": "f"}, "reward": {"strict_box": True}, "eval": {"sets": sets}}
    rewards = build_set_rewards(Config.model_validate(tree))
    assert list(rewards) == ["boxed", "too"] and rewards["boxed"] is rewards["too"]
    prompt = Prompt("t:0", np.zeros(1, np.int32), "q", "7", "set", {})
    assert [one.score for one in rewards["boxed"]([prompt], [rollout(4)], [["\\boxed{7}"]])] == [1.0]


def test_a_set_gives_kwargs_of_its_own_to_its_own_function(tmp_path: Path):
    """reward.kwargs are for reward.function; a set's function gets the set's, also where both are the same function."""
    function = tmp_path / "own.py"
    function.write_text("def of(data_source, solution_str, ground_truth, extra_info, bonus=0.0):\n    return bonus\n")
    name = f"{function}:of"
    own = {"files": "f", "reward_function": name}
    sets = {"two": {**own, "reward_kwargs": {"bonus": 2}}, "too": {**own, "reward_kwargs": {"bonus": 2}}, "plain": own}
    reward = {"function": name, "kwargs": {"bonus": 1}, "workers": 0}
    tree = {"model": {"path": "m"}, "data": {"files": "f"}, "reward": reward, "eval": {"sets": sets}}
    rewards = build_set_rewards(Config.model_validate(tree))
    assert list(rewards) == ["two", "too"] and rewards["two"] is rewards["too"], "plain has the run's own"
    prompt = Prompt("t:0", np.zeros(1, np.int32), "q", "7", "set", {})
    assert [one.score for one in rewards["two"]([prompt], [rollout(4)], [["x"]])] == [2.0]
    rewards = build_set_rewards(Config.model_validate({**tree, "reward": {"workers": 0}}))
    scores = {name: one([prompt], [rollout(4)], [["x"]])[0].score for name, one in rewards.items()}
    assert scores == {"two": 2.0, "too": 2.0, "plain": 0.0}


def test_math_dapo():
    scores = score("Answer: 7", "Answer: 8", "?")
    assert [s.answered for s in scores] == [True, True, False]
    assert scores == [
        Score(reward=1.0, score=1.0, acc=True, pred="7"),
        Score(reward=-1.0, score=-1.0, acc=False, pred="8"),
        Score(reward=-1.0, score=-1.0, acc=False, pred="[INVALID]"),
    ]


def test_strict_box():
    assert [s.acc for s in score("\\boxed{7}", "Answer: 7", strict_box=True)] == [True, False]


def test_the_penalty_is_in_the_reward_and_never_in_acc():
    scores = score(*["Answer: 7"] * 4, lengths=(8, 12, 16, 40), overlong=OVERLONG)
    assert [s.penalty for s in scores] == [0.0, -0.5, -1.0, -1.0]
    assert [s.reward for s in scores] == [1.0, 0.5, 0.0, 0.0]
    assert all(s.score == 1.0 and s.acc for s in scores)


def test_the_penalty_can_have_a_length_of_its_own():
    (scored,) = score("Answer: 7", lengths=(8,), overlong={**OVERLONG, "max_length": 10, "factor": 2.0})
    assert scored.penalty == -1.5


def test_the_penalty_is_for_tokens_of_the_policy_or_as_in_verl_for_all():
    settings = {**OVERLONG, "max_length": 16}
    for count, penalties in ((False, [0.0, -0.25]), (True, [-1.0, -1.0])):
        overlong = {**settings, "count_tool_output": count}
        scores = score(*["Answer: 7"] * 2, lengths=(8, 10), max_response_tokens=64, overlong=overlong)
        assert [s.penalty for s in scores] == penalties


def test_the_penalty_is_off_by_default():
    assert score("Answer: 7", lengths=(16,))[0].penalty == 0.0


@pytest.mark.parametrize("workers", [0, 1])
def test_failures_are_masked(workers: int):
    function = f"{ZOO}:by_text"
    bad, good = score("raise no", "score 1", function=function, workers=workers, failure_value=-3.0)
    assert bad == Score(reward=-3.0, score=-3.0, acc=False, failure="exception: ValueError: no", masked=True)
    assert good == Score(reward=1.0, score=1.0, acc=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_base_exception_loses_only_its_own_sample(workers: int):
    words = ("cancel", "interrupt", "out-of-time", "leave 3")
    *bad, good = score(*words, "score 1", function=f"{ZOO}:by_text", workers=workers)
    kinds = ("CancelledError", "KeyboardInterrupt", "FunctionTimedOut: scoring", "SystemExit: 3")
    assert all(kind in sample.failure for kind, sample in zip(kinds, bad, strict=True))
    assert good == Score(reward=1.0, score=1.0, acc=True)


def test_failures_get_the_configured_value_instead():
    settings = {"function": f"{ZOO}:by_text", "on_failure": "value", "failure_value": -3.0, "overlong": OVERLONG}
    settings["workers"] = 0
    (bad,) = score("score nan", lengths=(12,), **settings)
    assert bad == Score(reward=-3.5, score=-3.0, acc=False, penalty=-0.5, failure="nan", masked=False)


def test_an_imported_function_has_a_deadline_by_default():
    bad, good = score("spin", "score 1", function=f"{ZOO}:by_text", timeout_seconds=2.0)
    assert (bad.failure, bad.masked, good.reward) == ("timeout", True, 1.0)


def test_trl_sees_the_rows_columns():
    (scored,) = score("7", function=f"{ZOO}:trl_named", adapter="trl", workers=0)
    assert scored.acc


@pytest.mark.parametrize("workers", [0, 1])
def test_trl_sees_messages(workers: int):
    prompt = Prompt("t:0", np.zeros(1, np.int32), "q", "7", extra={"solution": "7"}, messages=[{"role": "user"}])
    reward = build_reward(RewardConfig(function=f"{ZOO}:trl_accuracy", adapter="trl", workers=workers), 16)
    assert [scored.reward for scored in reward([prompt] * 2, [rollout(1)] * 2, [["so 7"], ["so 8"]])] == [1.0, 0.0]
    reward.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reward_function_gets_the_turns_and_the_calls(workers: int):
    calls = (ToolCall("python", "3 +", "error", "SyntaxError", 0.1), ToolCall("python", "3 + 4", "ok", "7", 0.2))
    reward = build_reward(RewardConfig(function=f"{ZOO}:of_transcript", workers=workers), 16)
    prompt = Prompt("t:0", np.zeros(1, np.int32), "q", "7")
    used = replace(rollout(8), num_turns=3, calls=calls)
    with_tools, without = reward([prompt] * 2, [used, rollout(4)], [["Hm.", "Again.", "Answer: 7"], ["Answer: 8"]])
    reward.close()
    assert with_tools.pred.split(" ", 1)[1] == (
        "3 turns: Hm.|Again.|Answer: 7; python(3 +): error: SyntaxError, python(3 + 4): ok: 7"
    )
    assert without.pred.split(" ", 1)[1] == "1 turns: Answer: 8; "
    assert (with_tools.score, without.score) == (6.0, 2.0), "extra_info has verl's num_turns"


def test_only_the_tokens_that_the_policy_wrote_reach_the_function():
    reward = build_reward(RewardConfig(function=f"{ZOO}:trl_repr", adapter="trl", workers=0), 16)
    used = replace(rollout(3), token_ids=np.arange(6, dtype=np.int32), num_turns=3)
    assert reward([Prompt("t:0", np.zeros(1, np.int32), "q", "7")], [used], [["a", "b", "c"]])[0].acc
    _, completions, completion_ids, columns = sys.modules["plugin_plugin_zoo"].TRL_SEEN[-1]
    assert (completions, completion_ids) == (["a\nb\nc"], [[0, 2, 4]])
    assert columns["transcript"] == [{"num_turns": 3, "turns": ["a", "b", "c"], "calls": []}]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_function_that_cannot_be_loaded(workers: int):
    with pytest.raises(RewardError, match="no function 'absent'"):
        score("x", function=f"{ZOO}:absent", workers=workers)


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="zip"):
        score("x", "y", lengths=(1,))


def test_calls_of_several_threads_take_turns(monkeypatch):
    reward = build_reward(RewardConfig(), max_response_tokens=16)
    together, active = [], []

    def judge(attempt: object) -> float:
        active.append(attempt)
        time.sleep(0.01)  # so that calls that do not take turns meet
        together.append(len(active))
        active.pop()
        return 1.0

    monkeypatch.setattr(reward, "_judge", judge)
    prompt = Prompt("t:0", np.zeros(1, np.int32), "q", "7")
    threads = [threading.Thread(target=reward, args=([prompt], [rollout(4)], ["7"])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [1, 1, 1, 1]
