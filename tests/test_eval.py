"""Evaluation metrics by hand, and the sampling of evaluation sets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dapo_mcore.config.data import EvalConfig
from dapo_mcore.errors import DataError
from dapo_mcore.eval import evaluate, majority_acc, set_metrics, source_metrics, turn_metrics
from dapo_mcore.observe.metrics import describe
from dapo_mcore.types import Group, Prompt, Rollout, Sample, SamplingParams, Score, ToolCall


def make_prompt(index: int) -> Prompt:
    return Prompt(f"val:{index}", np.array([index], dtype=np.int32), "", "42")


def make_rollout(length: int = 1, truncated: bool = False) -> Rollout:
    tokens = np.zeros(length, dtype=np.int32)
    reason = "length" if truncated else "stop"
    return Rollout(tokens, tokens.astype(np.float32), tokens == 0, reason, weight_version=1)


def make_group(preds: str, length: int = 1, truncated: bool = False) -> Group:
    """Return a group with one sample per letter: R is right, `.` has no answer, `F` failed to score, others are wrong answers."""
    rollout = make_rollout(length, truncated)
    return Group(make_prompt(0), tuple(Sample(rollout, "", _score(pred)) for pred in preds))


def _score(pred: str) -> Score:
    if pred == "F":
        # failed, but not masked, as with reward.on_failure value
        return Score(reward=-1.0, score=-1.0, acc=False, pred="", failure="timeout")
    return Score(reward=1.0, score=1.0, acc=pred == "R", pred="" if pred == "." else pred)


@pytest.mark.parametrize(
    ("preds", "right"),
    [
        ("RRA", True),
        ("RAA", False),
        ("RA", True),
        ("AR", False),
        ("R..", True),
        ("FFFR", True),
        ("..", False),
        ("FF", False),
    ],
)
def test_majority(preds, right):
    assert majority_acc(make_group(preds)) == right


def test_set_metrics_by_hand():
    groups = [make_group("RRAF", length=2), make_group("AABR", length=6, truncated=True)]
    assert set_metrics(groups) == {
        "mean@4": pytest.approx((2 / 4 + 1 / 4) / 2),
        "best@4": 1.0,
        "maj@4": 0.5,
        "response_length": 4.0,
        "clip_ratio": 0.5,
        "failures": 1.0,
    }


def test_graded_scores_are_averaged_as_in_verl():
    """Two prompts with the scores 0.2, 1.0 and 0.2, 0.2 of a function that gives no acc."""
    group = make_group("AB")
    graded = [
        replace(
            group,
            samples=tuple(replace(sample, score=Score(acc, acc, acc)) for sample, acc in zip(group.samples, accs)),
        )
        for accs in ((0.2, 1.0), (0.2, 0.2))
    ]
    found = set_metrics(graded)
    assert (found["mean@2"], found["best@2"]) == (pytest.approx(1.6 / 4), pytest.approx(0.6))


def test_lengths_with_and_without_tool_output():
    group = make_group("RA", length=6)
    first = group.samples[0]
    mask = np.array([True, False, False, False, True, True])
    with_tool = replace(first, rollout=replace(first.rollout, loss_mask=mask))
    metrics = set_metrics([replace(group, samples=(with_tool, group.samples[1]))])
    assert (metrics["response_length"], metrics["policy_length"]) == (6.0, 4.5)


def test_turns_and_calls_of_a_set():
    plain = make_group("RR")
    calls = (ToolCall("python", "", "ok", "", 0.1), ToolCall("python", "", "error", "", 0.1))
    used = replace(plain.samples[0], rollout=replace(plain.samples[0].rollout, num_turns=3, calls=calls))
    groups = [plain, replace(plain, samples=(used, plain.samples[1]))]
    assert turn_metrics(groups) == {"turns": 1.5, "tool_calls": 0.5}


@pytest.mark.parametrize("preds", ["..", "FF", ".F"])
def test_without_any_named_answer_there_is_no_majority(preds):
    """Reward functions that return only a number name no answers. A maj@k of 0 would say that all majorities are wrong."""
    metrics = set_metrics([make_group(preds), make_group(preds)])
    assert "maj@2" not in metrics and metrics["mean@2"] == 0.0
    assert set_metrics([make_group(preds), make_group("RA")])["maj@2"] == 0.5


def test_best_is_a_share_of_prompts():
    assert set_metrics([make_group("AA"), make_group("AR"), make_group("RR")])["best@2"] == pytest.approx(2 / 3)


class RecordingEngine:
    """Answers with as many tokens as the prompt's number plus one."""

    weight_version = 1

    def __init__(self):
        self.calls = []

    def generate(self, prompts, params):
        self.calls.append(([int(p[0]) for p in prompts], params))
        return [make_rollout(int(p[0]) + 1) for p in prompts]


def reward(prompts, rollouts, turns):
    return [_score("R" if len(rollout.token_ids) > 1 else "A") for rollout in rollouts]


def test_evaluate_samples_every_set_as_the_section_says():
    engine = RecordingEngine()
    config = EvalConfig(samples_per_prompt=3, temperature=0.6, top_p=0.7, seed=11)
    sets = {"easy": [make_prompt(1), make_prompt(2)], "hard": [make_prompt(0)]}
    result = evaluate(
        engine, sets, reward, lambda responses: [f"{len(ids)} tokens" for ids in responses], config, max_new_tokens=9
    )
    assert [prompts for prompts, _ in engine.calls] == [[1, 1, 1, 2, 2, 2], [0, 0, 0]]
    for _, params in engine.calls:
        sampled = (params.temperature, params.top_p, params.top_k, params.max_new_tokens, params.seed)
        assert sampled == (0.6, 0.7, -1, 9, 11)
    assert result.metrics["val/easy/mean@3"] == 1.0 and result.metrics["val/hard/mean@3"] == 0.0
    assert result.metrics["val/easy/response_length"] == 2.5
    assert len(result.metrics) == 12
    more = evaluate(engine, sets, reward, lambda responses: [""] * len(responses), config, max_new_tokens=9, tools=True)
    assert more.metrics == result.metrics | {
        f"val/{name}/{key}": value for name in sets for key, value in {"turns": 1.0, "tool_calls": 0.0}.items()
    }
    assert [group.prompt.uid for group in result.groups["easy"]] == ["val:1", "val:2"]
    assert result.groups["hard"][0].samples[0].text == "1 tokens"


def test_a_set_has_its_own_sampling_and_reward():
    engine = RecordingEngine()
    own = {"samples_per_prompt": 2, "temperature": 0.0, "top_p": 0.5, "top_k": 20, "max_response_tokens": 99}
    config = EvalConfig(sets={"long": {"files": "a", **own}, "plain": {"files": "b"}}, samples_per_prompt=1, top_k=5)
    sets = {"long": [make_prompt(1)], "plain": [make_prompt(1)]}
    none_right = lambda prompts, rollouts, turns: [_score("A")] * len(rollouts)  # noqa: E731
    decode = lambda responses: [""] * len(responses)  # noqa: E731
    result = evaluate(engine, sets, reward, decode, config, 9, rewards={"long": none_right})
    assert [(prompts, params) for prompts, params in engine.calls] == [
        ([1, 1], SamplingParams(temperature=0.0, top_p=0.5, top_k=20, max_new_tokens=99, seed=777)),
        ([1], SamplingParams(temperature=1.0, top_p=1.0, top_k=5, max_new_tokens=9, seed=777)),
    ]
    assert (result.metrics["val/long/mean@2"], result.metrics["val/plain/mean@1"]) == (0.0, 1.0)


def test_a_set_of_several_sources_tells_the_mean_of_each():
    """3 of 4 samples of openai/gsm8k are right, 1 of 2 of the rows that name no source."""
    groups = [make_group("RR"), make_group("RA"), make_group("AR")]
    sources = ["openai/gsm8k", "openai/gsm8k", ""]
    mixed = [
        replace(group, prompt=replace(group.prompt, source=source))
        for group, source in zip(groups, sources, strict=True)
    ]
    assert source_metrics(mixed) == {"openai_gsm8k/mean@2": 0.75, "no_source/mean@2": 0.5}
    assert source_metrics(mixed[:2]) == source_metrics(groups) == {}
    assert describe("val/math/openai_gsm8k/mean@2") is not None


def test_a_set_without_prompts_is_an_error():
    with pytest.raises(DataError, match=r"eval.sets.empty has 0 prompts"):
        evaluate(RecordingEngine(), {"empty": []}, reward, str, EvalConfig(), max_new_tokens=4)
