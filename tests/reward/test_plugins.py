"""Loading reward functions by name, and calling them in both conventions."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from dapo_mcore.config.reward import FUNCTIONS
from dapo_mcore.errors import RewardError
from dapo_mcore.reward.attempt import Attempt, Outcome, judged
from dapo_mcore.reward.plugins import Rule, build_judge

ZOO = Path(__file__).with_name("plugin_zoo.py")


def outcome(name: str, adapter: str = "verl", **attempt) -> Outcome:
    settings = {"prompt": "q", "response": "7", "answer": "7", **attempt}
    return judged(build_judge(Rule(f"{ZOO}:{name}", adapter)), Attempt(**settings))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("math_verify_typo", "neither math_dapo, gsm8k, math_boxed, math_verify, by_source nor an import path"),
        (":f", "neither math_dapo, gsm8k, math_boxed, math_verify, by_source nor an import path"),
        ("no.such.module:f", "no.such.module cannot be imported: ModuleNotFoundError"),
        ("absent.py:f", "absent.py cannot be imported: FileNotFoundError"),
        (f"{ZOO}:no_such", "has no function 'no_such'; its functions are: anything, awaited, by_text, cancelled"),
        (f"{ZOO}:not_a_function", "has no function 'not_a_function'"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_refused_with_the_reason(spec: str, reason: str):
    with pytest.raises(RewardError) as error:
        build_judge(Rule(spec, "verl"))
    assert reason in str(error.value)


def test_the_built_in_rule_and_its_strict_box():
    attempt = Attempt("q", "Answer: 7", "7")
    assert judged(build_judge(Rule("math_dapo", "verl")), attempt) == Outcome(1.0, True, "7")
    assert judged(build_judge(Rule("math_dapo", "verl", strict_box=True)), attempt) == Outcome(-1.0, False, "[INVALID]")


@pytest.mark.parametrize(
    ("source", "response", "expected"),
    [
        ("openai/gsm8k", "#### 7", Outcome(1.0, True, "7")),
        ("math_dapo", "#### 7", Outcome(-1.0, False, "[INVALID]")),
        ("lighteval/MATH", r"\boxed{8}", Outcome(0.0, False, "8")),
        ("mine", "7", Outcome(0.5, 0.5)),
    ],
)
def test_each_source_has_its_rule(source: str, response: str, expected: Outcome):
    judge = build_judge(Rule("by_source", by_source={"mine": f"{ZOO}:half"}))
    assert judged(judge, Attempt("q", response, "7", source)) == expected


def test_a_source_without_a_rule_has_no_score_and_a_bad_rule_is_found_at_once():
    judge = build_judge(Rule("by_source"))
    assert "no rule for the data source 'other'" in str(judged(judge, Attempt("q", "7", "7", "other")).failure)
    with pytest.raises(RewardError, match=r"reward.by_source.mine '.*has no function 'absent'"):
        build_judge(Rule("by_source", by_source={"mine": f"{ZOO}:absent"}))


def test_a_function_gets_its_own_arguments_too():
    def call(rule: Rule) -> Outcome:
        return judged(build_judge(rule), Attempt("q", "7", "7", "mine", {"level": 3}))

    of_verl, of_trl = f"{ZOO}:with_more", f"{ZOO}:trl_named"
    assert call(Rule(of_verl, kwargs={"temperature": 2.5})) == Outcome(2.5, True)
    assert call(Rule("by_source", kwargs={"temperature": 2.5}, by_source={"mine": of_verl})) == Outcome(2.5, True)
    assert call(Rule(of_trl, "trl", kwargs={"level": [3]})) == Outcome(1.0, True)
    assert call(Rule(of_trl, "trl", kwargs={"level": [4]})) == Outcome(0.0, False)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (Rule(f"{ZOO}:half", kwargs={"weight": 1}), "got an unexpected keyword argument 'weight'"),
        (
            Rule(f"{ZOO}:half", kwargs={"data_source": "x"}),
            "reward.kwargs has data_source, which the run passes itself",
        ),
        (Rule(f"{ZOO}:trl_named", "trl", kwargs={"weight": 1}), "reward.kwargs has weight, which it does not take"),
        (Rule(f"{ZOO}:trl_length", "trl", kwargs={"prompts": 1}), "reward.kwargs has prompts, which the run passes"),
    ],
)
def test_arguments_that_a_function_cannot_take_are_refused_at_the_start(rule: Rule, reason: str):
    with pytest.raises(RewardError) as error:
        build_judge(rule)
    assert reason in str(error.value)


def test_verl_numbers_and_dicts():
    assert outcome("half") == Outcome(0.5, 0.5)
    assert outcome("exact") == Outcome(2.0, True, "7")
    assert outcome("exact", response="8") == Outcome(-0.5, False, "8")


def test_verl_arguments():
    assert outcome("echo", source="s", extra={"level": 3}).pred == "s|7|7|{'num_turns': 2, 'level': 3}"
    row = {"level": 3, "extra_info": {"i": 1}}
    assert outcome("echo", source="s", extra=row).pred == "s|7|7|{'num_turns': 2, 'i': 1}"
    assert outcome("echo", source="s", extra={"num_turns": "the row's"}).pred == "s|7|7|{'num_turns': \"the row's\"}"


@pytest.mark.parametrize("num_calls", range(11))
def test_verls_number_of_turns_counts_prompt_turns_and_answers_of_tools(num_calls: int):
    messages = ["prompt", *["call", "output"] * num_calls, "answer"]
    turns = [message for message in messages if message in ("call", "answer")]
    transcript = {"num_turns": len(turns), "turns": turns, "calls": []}
    assert outcome("of_transcript", transcript=transcript).score == len(messages)


def test_trl_arguments_and_numbers():
    assert outcome("trl_length", "trl", response="abc") == Outcome(3.0, True)
    assert outcome("trl_named", "trl", extra={"level": 3, "other": 1}) == Outcome(1.0, True)
    assert outcome("trl_named", "trl", extra={"level": 4}) == Outcome(0.0, False)
    assert "missing 1 required positional argument: 'level'" in outcome("trl_named", "trl").failure
    assert "gave 2 scores for 1 completion" in outcome("trl_two", "trl").failure
    assert outcome("trl_skip", "trl").failure == "none: the reward function gave no score for this sample"


def seen_by_trl(**attempt) -> tuple:
    """Return the arguments that a function of TRL's convention was called with."""
    judge = build_judge(Rule(f"{ZOO}:trl_repr", "trl"))
    assert judged(judge, Attempt("<user>q", "7", "8", **attempt)) == Outcome(1.0, True)
    return sys.modules["plugin_plugin_zoo"].TRL_SEEN[-1]


def test_trl_gets_text_for_a_text_prompt():
    row = {"solution": "8", "level": 3, "answer": "of the row"}
    prompts, completions, ids, columns = seen_by_trl(source="s", extra=row, token_ids=np.array([5, 2], np.int32))
    assert (prompts, completions, ids) == (["<user>q"], ["7"], [[5, 2]])
    assert columns == {
        **{"solution": ["8"], "level": [3], "answer": ["of the row"]},
        **{"ground_truth": ["8"], "data_source": ["s"]},
        "transcript": [{"num_turns": 1, "turns": ["7"], "calls": []}],
    }


def test_trl_gets_messages_for_a_chat():
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "q"}]
    prompts, completions, _, _ = seen_by_trl(messages=chat)
    assert prompts == [chat]
    assert completions == [[{"role": "assistant", "content": "7"}]]


CHAT = [{"role": "user", "content": "9 + 9?"}]


def test_a_function_in_the_shape_of_trls_accuracy_reward():
    row = {"extra": {"solution": "18"}, "messages": CHAT}
    assert outcome("trl_accuracy", "trl", response="so 18", **row) == Outcome(1.0, True)
    assert outcome("trl_accuracy", "trl", response="so 19", **row) == Outcome(0.0, False)


def test_trls_own_rewards():
    pytest.importorskip("trl.rewards", reason="needs TRL: pip install trl math-verify[antlr4_13_2]")

    def score(name: str, response: str) -> float | str:
        judge = build_judge(Rule(f"trl.rewards:{name}", "trl"))
        found = judged(judge, Attempt("", response, "18", extra={"solution": "$18$"}, messages=CHAT))
        return found.failure or found.score

    assert score("accuracy_reward", "so \\boxed{18.0}") == 1.0
    assert score("accuracy_reward", "so \\boxed{19}") == 0.0
    assert score("think_format_reward", "<think>9 + 9</think>18") == 1.0
    assert score("think_format_reward", "18") == 0.0


@pytest.mark.parametrize(
    ("response", "failure"),
    [
        ("score nan", "nan"),
        ("score inf", "inf"),
        ("score -inf", "-inf"),
        ("raise bad day", "exception: ValueError: bad day"),
        ("leave 3", "exception: SystemExit: 3"),
        ("interrupt", "exception: KeyboardInterrupt"),
        ("out-of-time", "exception: FunctionTimedOut: scoring took 5 s"),
        ("cancel", "exception: CancelledError"),
        ("textless", "exception: TextlessError: its text raised ValueError"),
        ("score 1e300", "too large: 1e+300 is beyond ±1e+30"),
        ("none", "none: the reward function gave no score for this sample"),
        ("text", "exception: TypeError: the reward function gave '1.0' of type str instead of a number"),
        ("empty", "exception: ValueError: the reward function gave a dict without 'score'; it has acc"),
    ],
)
def test_failures_are_outcomes(response: str, failure: str):
    assert outcome("by_text", response=response) == Outcome(failure=failure)


def test_a_failure_is_one_line_of_bounded_length():
    failure = outcome("by_text", response="essay").failure
    assert failure.startswith("exception: ValueError: word word ") and len(failure) < 1100


def test_an_async_function_is_awaited_in_one_event_loop():
    judge = build_judge(Rule(f"{ZOO}:awaited", "verl"))
    assert [judged(judge, Attempt("q", "7", "7")) for _ in range(2)] == [Outcome(1.0, True)] * 2


@pytest.mark.parametrize(
    ("name", "adapter", "reason"),
    [
        (
            "without_extra",
            "verl",
            "got an unexpected keyword argument 'extra_info'; it must take data_source, solution_str",
        ),
        ("with_more", "verl", "missing a required argument: 'temperature'; it must take data_source"),
        ("trl_named", "verl", "for TRL's convention set reward.adapter trl"),
        ("half", "trl", "takes neither completions nor **kwargs; for verl's convention set reward.adapter verl"),
        ("trl_schedule", "trl", "it needs trainer_state, log_metric, which only TRL's trainer has; give a default"),
    ],
)
def test_a_signature_that_does_not_fit_is_refused_at_the_start(name: str, adapter: str, reason: str):
    with pytest.raises(RewardError) as error:
        build_judge(Rule(f"{ZOO}:{name}", adapter))
    assert f"plugin_zoo.py:{name}' cannot be called as reward.adapter {adapter}: " in str(error.value)
    assert reason in str(error.value)


def test_signatures_that_fit_in_another_way():
    assert outcome("anything").score == 4
    assert judged(build_judge(Rule("builtins:max", "trl")), Attempt("q", "7", "7")).failure


def test_the_words_that_the_configuration_takes_are_functions() -> None:
    for word in FUNCTIONS:
        build_judge(Rule(function=word, adapter="verl", strict_box=False))
