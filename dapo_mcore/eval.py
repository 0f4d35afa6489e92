"""mean@k, best@k and maj@k on validation sets, generated and scored by the same code as in training.

Change here: which metrics an evaluation set gives.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dapo_mcore.config.data import EvalConfig
from dapo_mcore.errors import DataError
from dapo_mcore.observe.progress import NullProgress
from dapo_mcore.rollout.sampling.respond import Decode, Responder
from dapo_mcore.types import Group, Prompt, RewardFunction, RolloutEngine, Sample, SamplingParams


@dataclass(frozen=True, slots=True)
class EvalResult:
    """metrics: `val/<set>/…`, see set_metrics. groups: each set's prompts with their k samples."""

    metrics: dict[str, float]
    groups: dict[str, list[Group]]


def evaluate(
    engine: RolloutEngine,
    sets: Mapping[str, Sequence[Prompt]],
    reward: RewardFunction,
    decode: Decode,
    eval_config: EvalConfig,
    max_new_tokens: int,
    progress: NullProgress | None = None,
    tools: bool = False,
    rewards: Mapping[str, RewardFunction] | None = None,
) -> EvalResult:
    """Return the metrics and samples of every set, sampled as `eval_config.of` its name says.

    max_new_tokens  of sets that have no length of their own.
    tools           whether the policy has tools; then turns and calls are counted.
    rewards         the reward functions of sets that have one of their own; the others have `reward`.

    Every set uses the same seed, so a set's result does not depend on the other sets, and successive evaluations differ
    only by the weights. Raise DataError for a set without prompts.
    """
    metrics: dict[str, float] = {}
    groups: dict[str, list[Group]] = {}
    for name, prompts in sets.items():
        if not prompts:
            raise DataError(f"eval.sets.{name} has 0 prompts; a mean needs at least 1: check its files and limit")
        own, scored_by = eval_config.of(name), (rewards or {}).get(name, reward)
        params = SamplingParams(
            temperature=own.temperature,
            top_p=own.top_p,
            top_k=own.top_k,
            max_new_tokens=own.max_response_tokens or max_new_tokens,
            seed=eval_config.seed,
        )
        groups[name] = Responder(engine, scored_by, decode, progress).groups(prompts, own.samples_per_prompt, params)
        found = set_metrics(groups[name]) | source_metrics(groups[name]) | (turn_metrics(groups[name]) if tools else {})
        metrics |= {f"val/{name}/{key}": value for key, value in found.items()}
    return EvalResult(metrics, groups)


def set_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Return the metrics of one set, groups of k samples each. Accuracies are means of types.Score.acc over prompts, in [0, 1].

    mean@k           mean accuracy of the samples (for AIME with k = 32 the paper's avg@32).
    best@k           mean accuracy of each prompt's best sample: the share of prompts with a right one.
    maj@k            mean accuracy of each prompt's most frequent answer; absent if the reward function names no answer.
    response_length  tokens; clip_ratio: share of samples truncated at the length limit.
    policy_length    tokens without tool output; absent if no response has any.
    failures         samples whose scoring failed. They count as wrong, so if there are any, the accuracies are too low.
    """
    k = len(groups[0].samples)
    correct = np.array([[_acc(sample) for sample in group.samples] for group in groups], dtype=np.float64)
    samples = [sample for group in groups for sample in group.samples]
    names_answers = any(_has_vote(sample) for sample in samples)
    lengths = [len(sample.rollout.token_ids) for sample in samples]
    own = [sample.rollout.num_policy_tokens for sample in samples]
    majority = {f"maj@{k}": float(np.mean([majority_acc(group) for group in groups]))} if names_answers else {}
    return {
        f"mean@{k}": float(correct.mean()),
        f"best@{k}": float(correct.max(axis=1).mean()),
        **majority,
        "response_length": float(np.mean(lengths)),
        **({"policy_length": float(np.mean(own))} if own != lengths else {}),
        "clip_ratio": float(np.mean([sample.rollout.truncated for sample in samples])),
        "failures": float(sum(sample.score.failure is not None for sample in samples)),
    }


def source_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Return `<source>/mean@k` for each data source of a set that mixes several; {} for a set of one.

    A `/` in a source becomes `_`, as names of metrics have one level for it: `openai_gsm8k`. Rows without one are `no_source`.
    """
    by_source: dict[str, list[Group]] = {}
    for group in groups:
        by_source.setdefault(re.sub(r"[/@]", "_", group.prompt.source) or "no_source", []).append(group)
    if len(by_source) < 2:
        return {}
    return {
        f"{source}/{key}": value
        for source, found in by_source.items()
        for key, value in set_metrics(found).items()
        if key.startswith("mean@")
    }


def turn_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Return means over the samples of one set: `turns` that the policy wrote, and `tool_calls`."""
    rollouts = [sample.rollout for group in groups for sample in group.samples]
    return {
        "turns": float(np.mean([rollout.num_turns for rollout in rollouts])),
        "tool_calls": float(np.mean([len(rollout.calls) for rollout in rollouts])),
    }


def majority_acc(group: Group) -> float:
    """Return the accuracy of the most frequent extracted answer. In a tie the earliest answer counts.

    Samples without an answer, or whose scoring failed, have no vote. Without any vote the prompt counts as wrong.
    """
    voters = [sample for sample in group.samples if _has_vote(sample)]
    if not voters:
        return 0.0
    # most_common sorts stably, and a Counter keeps the order of first appearance.
    answer = Counter(sample.score.pred for sample in voters).most_common(1)[0][0]
    return next(_acc(sample) for sample in voters if sample.score.pred == answer)


def _has_vote(sample: Sample) -> bool:
    return bool(sample.score.pred) and sample.score.failure is None


def _acc(sample: Sample) -> float:
    return sample.score.acc if sample.score.failure is None else 0.0
