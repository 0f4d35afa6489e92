"""How old the weights are that made what a step trains on.

Change here: what is reported about it. What is too old to be trained on is sampler.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from dapo_mcore.types import Group, Rollout


def staleness_stats(groups: Sequence[Group], trained: int) -> dict[str, float]:
    """The `sampling/…` metrics of `groups` (at least one, of at least one token) that the policy of version `trained`
    trains on. A group is as old as its oldest token."""
    ages = [trained - group.weight_version for group in groups]
    rollouts = [sample.rollout for group in groups for sample in group.samples]
    num_tokens = sum(len(rollout.token_ids) for rollout in rollouts)
    return {
        "sampling/staleness_mean": sum(ages) / len(ages),
        "sampling/staleness_max": float(max(ages)),
        "sampling/token_staleness_mean": trained - sum(map(_version_sum, rollouts)) / num_tokens,
        "sampling/samples_resumed": float(sum(bool(rollout.version_spans) for rollout in rollouts)),
    }


def _version_sum(rollout: Rollout) -> int:
    """Sum over tokens of the version that made each."""
    spans = rollout.version_spans or ((0, rollout.weight_version),)
    ends = [*(start for start, _ in spans[1:]), len(rollout.token_ids)]
    return sum((end - start) * version for (start, version), end in zip(spans, ends, strict=True))
