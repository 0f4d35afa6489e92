"""What is told about a rollout step without a right answer."""

from __future__ import annotations

import subprocess
from typing import Any

import numpy as np

from dapo_mcore.config.schema import Config
from dapo_mcore.rollout.sampling.none_right import why_none_right
from dapo_mcore.types import Group, Prompt, Rollout, Sample, Score


def configured(**sections: Any) -> Config:
    return Config.model_validate({"model": {"path": "m"}, "data": {"files": ["f"]}, **sections})


def sample(text: str, acc: bool = False, pred: str = "3", reason: Any = "stop", masked: bool = False) -> Sample:
    one = np.zeros(1, np.int32)
    rollout = Rollout(one, one.astype(np.float32), one == 0, reason, 0)
    return Sample(rollout, text, Score(1.0, 1.0, acc, pred, masked=masked))


def group(*samples: Sample, source: str = "") -> Group:
    return Group(Prompt("u", np.zeros(1, np.int32), "6*7?", "4 2", source), samples)


def test_the_causes_have_the_steps_numbers_and_a_command() -> None:
    cut = sample("so it is", pred="[INVALID]", reason="length")
    line = why_none_right([group(cut, sample("it's\nAnswer: 3"))], 1, configured(), num_cut_prompts=5)
    assert line.startswith(
        "warning: none of the 2 responses of rollout step 1 is right. 1 have no answer that math_dapo finds: do "
    )
    assert "; 1 reach rollout.max_response_tokens 20480: raise it, or set rollout.stop; " in line
    assert "; 5 prompts are cut to data.max_prompt_tokens 2048; a chat model" in line
    assert "Read runs/run/samples/step_000001.jsonl, and try one: " in line
    command = "dapo-mcore reward-explain --function math_dapo --answer '4 2' --text $'it\\'s\\nAnswer: 3'"
    assert line.endswith(command) and "\n" not in line


def test_the_response_that_is_tried_has_text() -> None:
    line = why_none_right([group(sample(""), sample("cut", reason="length"), sample(" "))], 1, configured(), 0)
    assert line.endswith("--text $'cut'")


def test_the_shell_gives_the_response_back() -> None:
    text = "a 'b' \\frac\n\"$HOME\" `x` $(y)!"
    line = why_none_right([group(sample(text))], 1, configured(), 0)
    script = line[line.index("dapo-mcore") :].replace("dapo-mcore reward-explain", "printf '%s|'")
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("|") == ["--function", "math_dapo", "--answer", "4 2", "--text", text, ""]


def test_the_rule_of_the_source_is_tried() -> None:
    config = configured(reward={"function": "by_source"})
    line = why_none_right([group(sample("7"), source="openai/gsm8k")], 1, config, 0)
    assert "--function gsm8k --source openai/gsm8k --answer" in line and "truncation" not in line


def test_arguments_of_the_users_function_are_in_the_command() -> None:
    config = configured(reward={"function": "f.py:f", "kwargs": {"bonus": 2}})
    assert """--function f.py:f --kwargs '{"bonus": 2}' --answer""" in why_none_right(
        [group(sample("7"))], 1, config, 0
    )


def test_nothing_is_told_of_a_step_with_a_right_answer_or_without_any_score() -> None:
    assert why_none_right([group(sample("a"), sample("b", acc=True))], 1, configured(), 0) == ""
    assert why_none_right([group(sample("a", masked=True))], 1, configured(), 0) == ""
    assert why_none_right([], 1, configured(), 0) == ""
