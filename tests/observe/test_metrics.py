"""Group metrics against numbers worked out by hand."""

from __future__ import annotations

import ast
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dapo_mcore.observe.metrics import METRICS, OLD_NAMES, current_name, describe, group_metrics, tool_metrics
from dapo_mcore.types import Group, Prompt, Rollout, Sample, Score, ToolCall


def sample(length: int, score: Score, finish: str = "stop", tool: int = 0) -> Sample:
    """Return a sample of `length` tokens that ends in `tool` tokens of tool output."""
    ids, mask = np.zeros(length, dtype=np.int32), np.arange(length) < length - tool
    return Sample(Rollout(ids, np.zeros(length, np.float32), mask, finish, 0), "text", score)


def group(*samples: Sample) -> Group:
    return Group(Prompt("train:0", np.zeros(1, np.int32), "1+1=", "2"), samples)


RIGHT = Score(reward=1.0, score=1.0, acc=True, pred="2")
WRONG = Score(reward=-1.0, score=-1.0, acc=False, pred="3")
LATE = Score(reward=0.5, score=1.0, acc=True, pred="2", penalty=-0.5)
UNPARSED = Score(reward=-1.0, score=-1.0, acc=False, pred="[INVALID]")
FAILED = Score(reward=-1.0, score=-1.0, acc=False, failure="timeout", masked=True)
FAILED_WITH_VALUE = Score(reward=-1.0, score=-1.0, acc=False, failure="nan")


def test_statistics_of_two_groups_by_hand() -> None:
    mixed = group(sample(4, RIGHT), sample(10, LATE, "length"), sample(2, WRONG), sample(7, FAILED))
    uniform = group(sample(3, UNPARSED))
    metrics = group_metrics([mixed, uniform], [mixed])
    # scored rewards: 1, 0.5, -1, -1; mean -0.125; variance (1 + 0.25 + 1 + 1) / 4 - 0.125² = 0.796875
    assert metrics == pytest.approx(
        {
            "reward/mean": -0.125,
            "reward/std": math.sqrt(0.796875),
            "reward/score_mean": 0.0,
            "reward/overlong_penalty_mean": -0.125,
            "reward/acc": 0.5,
            "reward/acc_kept": 2 / 3,
            "reward/groups_one_scored": 0.0,
            "reward/failures": 1.0,
            "reward/unparsed_ratio": 0.25,
            "reward/void_ratio": 0.25,
            "response_length/mean": 5.2,
            "response_length/max": 10.0,
            "response_length/min": 2.0,
            "response_length/clip_ratio": 0.2,
        }
    )
    assert all(type(value) is float for value in metrics.values())


def test_a_failure_with_a_value_counts_in_statistics_but_not_as_unparsed() -> None:
    metrics = group_metrics([group(sample(1, RIGHT), sample(1, FAILED_WITH_VALUE))], [])
    assert (metrics["reward/mean"], metrics["reward/failures"], metrics["reward/unparsed_ratio"]) == (0.0, 1.0, 0.0)


def test_lengths_with_and_without_tool_output() -> None:
    metrics = group_metrics([group(sample(9, RIGHT, tool=4), sample(3, WRONG), sample(6, FAILED, tool=6))], [])
    lengths = {name.partition("/")[2]: value for name, value in metrics.items() if name.startswith("response_length/")}
    assert lengths == pytest.approx(
        {"mean": 6.0, "max": 9.0, "min": 3.0, "clip_ratio": 0.0, "policy_mean": 8 / 3, "policy_max": 5.0}
    )


def test_void_samples_have_no_answer_or_no_token_of_the_policy() -> None:
    right_without_name = Score(reward=1.0, score=1.0, acc=True)
    samples = [sample(2, UNPARSED), sample(2, RIGHT, tool=2), sample(2, right_without_name), sample(2, WRONG, tool=1)]
    samples += [sample(2, FAILED_WITH_VALUE), sample(2, FAILED, tool=2)]
    assert [one.void for one in samples] == [True, True, False, False, False, True]
    assert group_metrics([group(*samples)], [])["reward/void_ratio"] == 2 / 5, "of the scored ones"
    unnamed = Score(reward=-1.0, score=-1.0, acc=False)
    assert "reward/void_ratio" not in group_metrics([group(sample(2, unnamed), sample(2, right_without_name))], [])


def test_trained_groups_with_one_score_left_are_counted() -> None:
    sampled_once, whole = group(sample(1, RIGHT)), group(sample(1, RIGHT), sample(1, WRONG))
    failed = group(sample(1, RIGHT), sample(1, FAILED))
    aborted = group(sample(1, RIGHT), sample(1, WRONG, "abort"))
    metrics = group_metrics([failed] * 3, [sampled_once, whole, failed, aborted])
    assert metrics["reward/groups_one_scored"] == 2.0


def test_turns_and_calls_by_hand() -> None:
    def used(length: int, num_tool_tokens: int, num_turns: int, *kinds: str) -> Sample:
        one = sample(length, RIGHT)
        calls = tuple(ToolCall("python", "", kind, "", float(seconds)) for seconds, kind in enumerate(kinds))
        mask = np.arange(length) >= num_tool_tokens
        return replace(one, rollout=replace(one.rollout, loss_mask=mask, num_turns=num_turns, calls=calls))

    groups = [
        group(used(9, 6, 3, "ok", "error", "timeout"), used(5, 0, 1)),
        group(used(7, 2, 2, "infrastructure"), sample(1, FAILED)),
    ]
    assert tool_metrics(groups) == {
        "turns/mean": 7 / 4,
        "turns/max": 3.0,
        "tools/calls": 4.0,
        "tools/errors": 1.0,
        "tools/timeouts": 1.0,
        "tools/lost": 1.0,
        "tools/call_s": 3 / 4,
        "tools/tokens": 2.0,
    }
    assert all(type(value) is float for value in tool_metrics(groups).values())


def test_statistics_over_nothing_are_nan() -> None:
    counts = {
        "reward/failures",
        "reward/groups_one_scored",
        "tools/calls",
        "tools/errors",
        "tools/timeouts",
        "tools/lost",
    }
    found = group_metrics([], []) | tool_metrics([])
    assert all(math.isnan(value) for name, value in found.items() if name not in counts)
    failed = group_metrics([group(sample(5, FAILED))], [])
    assert math.isnan(failed["reward/mean"])
    assert failed["response_length/mean"] == 5.0


def test_every_metric_made_here_is_in_the_table() -> None:
    assert set(group_metrics([], []) | tool_metrics([])) <= set(METRICS)


def test_every_metric_named_anywhere_in_the_code_is_in_the_table() -> None:
    metric = re.compile(
        r"(reward|response_length|sampling|actor|critic|mismatch|tis|rollout|sync|perf|memory|time|val)/[a-z0-9_@]+"
    )
    named = set()
    for path in (Path(__file__).parents[2] / "dapo_mcore").rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        named |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    named = {name for name in named - set(OLD_NAMES) if metric.fullmatch(name)}
    assert "actor/entropy" in named, "the search found nothing"
    assert sorted(name for name in named if describe(name) is None) == []


def test_the_readme_compares_names_that_exist_with_those_of_verl() -> None:
    readme = (Path(__file__).parents[2] / "dapo_mcore/observe/README.md").read_text(encoding="utf-8")
    rows = [row.split("|") for row in readme.partition("| here | verl |")[2].splitlines()[2:] if row]
    ours = {name for row in rows for name in re.findall("`([^`]+)`", row[1])}
    assert [name for name in sorted(ours) if describe(name) is None] == ["step"]
    shared = {row[1].strip(" `") for row in rows if row[1] == row[2]}
    assert {"response_length/clip_ratio", "actor/ppo_kl"} < shared


def test_old_names_lead_to_names_in_the_table() -> None:
    assert set(OLD_NAMES.values()) <= set(METRICS) and not set(OLD_NAMES) & set(METRICS)
    assert current_name("response_length/truncated_ratio") == "response_length/clip_ratio"
    assert current_name("val/aime24/truncated_ratio") == "val/aime24/clip_ratio"
    for kept in ("tis/truncated_ratio", "val/a/b/truncated_ratio", "step"):
        assert current_name(kept) == kept


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("actor/entropy", "actor/entropy"),
        ("val/aime24/mean@32", "val/<set>/mean@<k>"),
        ("val/aime24/response_length", "val/<set>/response_length"),
        ("time/generate_s", "time/<phase>_s"),
        ("time/step_s", "time/step_s"),
        ("time/eval_s", "time/eval_s"),
    ],
)
def test_names_with_placeholders_find_their_entry(name: str, entry: str) -> None:
    assert describe(name) is METRICS[entry]


@pytest.mark.parametrize("name", ["val/mean@3", "val/a/b/c/mean@3", "val/a/median@3", "actor/entropyy", "step"])
def test_an_unlisted_name_has_no_entry(name: str) -> None:
    assert describe(name) is None
