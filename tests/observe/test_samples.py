"""Which completions are shown, and what is written about them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from dapo_mcore.observe.samples import pick_samples, write_samples
from dapo_mcore.types import Group, Prompt, Rollout, Sample, Score, ToolCall


def group(name: str, *accs: bool) -> Group:
    prompt = Prompt(name, np.zeros(1, np.int32), f"prompt {name}", "42", row=f"{name}.jsonl row 1")
    rollout = Rollout(np.zeros(3, np.int32), np.zeros(3, np.float32), np.ones(3, bool), "length", 7)
    samples = [
        Sample(rollout, f"{name}{i}", Score(1.0 if acc else -1.0, 1.0 if acc else -1.0, acc, "42"))
        for i, acc in enumerate(accs)
    ]
    return Group(prompt, tuple(samples))


def texts(groups: list[Group], count: int) -> list[str]:
    return [sample.text for _, sample in pick_samples(groups, count)]


def test_right_and_wrong_alternate_over_different_prompts() -> None:
    groups = [group("a", True, True, False), group("b", True, False), group("c", False)]
    assert texts(groups, 4) == ["a0", "c0", "b0", "b1"]


def test_one_kind_fills_up_when_the_other_is_exhausted() -> None:
    groups = [group("a", False, False), group("b", False, True)]
    assert texts(groups, 10) == ["b1", "a0", "b0", "a1"]
    assert texts([group("a", True, True)], 1) == ["a0"]


def test_nothing_to_write_makes_no_file(tmp_path: Path) -> None:
    assert pick_samples([group("a", True)], 0) == [] == pick_samples([], 4)
    assert write_samples(tmp_path, 1, []) is None
    assert list(tmp_path.iterdir()) == []


def test_the_record_of_a_sample(tmp_path: Path) -> None:
    path = write_samples(tmp_path, 12, pick_samples([group("a", True)], 4))
    assert path == tmp_path / "samples" / "step_000012.jsonl"
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [
        {
            "uid": "a",
            "row": "a.jsonl row 1",
            "prompt": "prompt a",
            "response": "a0",
            "pred": "42",
            "answer": "42",
            "source": "",
            "acc": True,
            "score": 1.0,
            "penalty": 0.0,
            "reward": 1.0,
            "failure": None,
            "length": 3,
            "finish_reason": "length",
            "weight_version": 7,
        }
    ]


def test_the_record_of_a_sample_with_tools(tmp_path: Path) -> None:
    ((prompt, sample),) = pick_samples([group("a", True)], 1)
    calls = (ToolCall("python", "1 +", "error", "SyntaxError", 0.1), ToolCall("python", "1 + 1", "ok", "2", 0.2))
    used = replace(sample, rollout=replace(sample.rollout, num_turns=3, calls=calls))
    path = write_samples(tmp_path, 12, [(prompt, used)])
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["num_turns"] == 3 and record["calls"] == [asdict(call) for call in calls]
