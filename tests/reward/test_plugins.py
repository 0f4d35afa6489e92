"""Loading reward functions by name, the two conventions, and what counts as a score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dapo_mcore.errors import RewardError
from dapo_mcore.reward.attempt import Attempt, Outcome, judged
from dapo_mcore.reward.plugins import build_judge, load_function

ZOO = Path(__file__).with_name("plugin_zoo.py")


def outcome(name: str, adapter: str = "verl", **attempt) -> Outcome:
    settings = {"prompt": "q", "response": "7", "answer": "7", **attempt}
    return judged(build_judge(f"{ZOO}:{name}", adapter, strict_box=False), Attempt(**settings))


def test_by_module_and_by_file():
    assert load_function("math:sqrt")(4) == 2
    assert load_function(f"{ZOO}:half")("s", "r", "t") == 0.5


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("math_verify_typo", "neither math_dapo nor an import path"),
        (":f", "neither math_dapo nor an import path"),
        ("no.such.module:f", "no.such.module cannot be imported: ModuleNotFoundError"),
        ("absent.py:f", "absent.py cannot be imported: FileNotFoundError"),
        (f"{ZOO}:no_such", "has no function 'no_such'; its functions are: by_text, echo, exact, half, trl"),
        (f"{ZOO}:not_a_function", "has no function 'not_a_function'"),
    ],
)
def test_what_cannot_be_loaded(spec: str, reason: str):
    with pytest.raises(RewardError) as error:
        build_judge(spec, "verl", strict_box=False)
    assert reason in str(error.value)


@pytest.mark.parametrize("body", ["def f(:", "1 / 0", "raise SystemExit(3)"])
def test_a_file_that_fails_on_import(tmp_path: Path, body: str):
    (tmp_path / "broken.py").write_text(body)
    with pytest.raises(RewardError, match=r"broken\.py cannot be imported"):
        load_function(f"{tmp_path / 'broken.py'}:f")


def test_the_built_in_rule_and_its_strict_box():
    attempt = Attempt("q", "Answer: 7", "7")
    assert judged(build_judge("math_dapo", "verl", strict_box=False), attempt) == Outcome(1.0, True, "7")
    assert judged(build_judge("math_dapo", "verl", strict_box=True), attempt) == Outcome(-1.0, False, "[INVALID]")


def test_verl_numbers_and_dicts():
    assert outcome("half") == Outcome(0.5, True)
    assert outcome("exact") == Outcome(2.0, True, "7")
    assert outcome("exact", response="8") == Outcome(-0.5, False, "8")


def test_verl_arguments():
    assert outcome("echo", source="s", extra={"level": 3}).pred == "s|7|7|{'level': 3}"
    assert outcome("echo", source="s", extra={"level": 3, "extra_info": {"i": 1}}).pred == "s|7|7|{'i': 1}"


def test_trl_arguments_and_numbers():
    assert outcome("trl_length", "trl", response="abc") == Outcome(3.0, True)
    assert outcome("trl_named", "trl", extra={"level": 3, "other": 1}) == Outcome(1.0, True)
    assert outcome("trl_named", "trl", extra={"level": 4}) == Outcome(0.0, False)
    assert "missing 1 required positional argument: 'level'" in outcome("trl_named", "trl").failure
    assert "gave 2 scores for 1 completion" in outcome("trl_two", "trl").failure


@pytest.mark.parametrize(
    ("response", "failure"),
    [
        ("score nan", "nan"),
        ("score inf", "inf"),
        ("score -inf", "-inf"),
        ("raise bad day", "exception: ValueError: bad day"),
        ("leave 3", "exception: SystemExit: 3"),
        ("none", "exception: TypeError: the reward function gave None of type NoneType instead of a number"),
        ("text", "exception: TypeError: the reward function gave '1.0' of type str instead of a number"),
        ("empty", "exception: ValueError: the reward function gave a dict without 'score'; it has acc"),
    ],
)
def test_failures_are_outcomes(response: str, failure: str):
    assert outcome("by_text", response=response) == Outcome(failure=failure)


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (True, Outcome(1.0, True)),
        (np.float32(0.5), Outcome(0.5, True)),
        (np.bool_(False), Outcome(0.0, False)),
        (torch.tensor(-1.0), Outcome(-1.0, False)),
        ({"score": -1.0, "acc": True, "pred": None}, Outcome(-1.0, True)),
        ({"score": 1.0, "acc": np.float64(0.0), "pred": 5}, Outcome(1.0, False, "5")),
        ({"score": 1.0, "acc": float("nan")}, Outcome(failure="nan")),
        ({"score": 1.0, "acc": None}, Outcome(1.0, True)),
    ],
)
def test_what_counts_as_a_number(result, expected: Outcome):
    found = judged(lambda attempt: result, Attempt("q", "r", "a"))
    assert found == expected
    assert type(found.acc) is bool and type(found.score) is float
