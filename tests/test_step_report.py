"""The report of a rollout step: what is kept for its row, its samples and the screen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from dapo_mcore.config.schema import Config
from dapo_mcore.rollout.sampling.sampler import Collected
from dapo_mcore.step_report import StepReport
from dapo_mcore.types import Group, Prompt, Rollout, Sample, Score

RIGHT = Score(reward=1.0, score=1.0, acc=True, pred="2")
FAILED = Score(reward=0.0, score=0.0, acc=False, pred="", failure="timeout", masked=True)


def group(uid: str, *scores: Score) -> Group:
    rollout = Rollout(np.array([7], np.int32), np.zeros(1, np.float32), np.ones(1, bool), "stop", 0)
    prompt = Prompt(uid, np.array([1], np.int32), "1+1=", "2")
    return Group(prompt, tuple(Sample(rollout, "2", score) for score in scores))


def report(config: Config) -> StepReport:
    kept, other = group("a", RIGHT, RIGHT), group("b", FAILED, RIGHT)
    return StepReport.of(Collected([kept], [kept, other], {"sampling/samples_generated": 4.0}), [kept], config)


def test_metrics_are_of_all_groups_and_samples_of_those_to_show(tmp_path: Path) -> None:
    tree = {"model": {"path": "m"}, "data": {"files": "f"}, "observe": {"samples_per_step": 1}}
    found = report(Config.model_validate(tree))
    assert found.metrics["reward/acc"] == 1.0 and found.metrics["sampling/samples_generated"] == 4.0
    assert [prompt.uid for prompt, _ in found.shown] == ["a"]
    found.write_samples(tmp_path, 3, print)
    (row,) = (tmp_path / "samples/step_000003.jsonl").read_text().splitlines()
    assert json.loads(row)["response"] == "2"
    assert found.num_failures == 1 and found.failures == "1 of 4 samples have no score; the first: timeout"


def test_samples_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    tree = {"model": {"path": "m"}, "data": {"files": "f"}}
    told: list[str] = []
    (tmp_path / "samples").write_text("a file in place of the folder")
    report(Config.model_validate(tree)).write_samples(tmp_path, 3, told.append)
    assert len(told) == 1 and "write samples" in told[0]
