"""The record of one rollout step: the seeds of its calls, what it generated, and the metrics about that.

Change here: what is counted about a step, whether rounds.py or refill.py generates its groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dapo_mcore.algo.filtering import classify, group_varies
from dapo_mcore.config.schema import Config
from dapo_mcore.errors import RewardError
from dapo_mcore.types import Group, Rollout, SamplingParams

KEEPS: dict[str, Callable[[Group], bool]] = {
    "none": lambda group: True,
    "filter": group_varies,
    "resample": lambda group: classify(group) == "mixed",
}
"""Which groups are trained on, by sampling.style."""


@dataclass
class Step:
    """What rollout step `number` has generated so far.

    oldest      the oldest weight version of a group that may be trained on.
    generated   all groups finished in this step, in prompt order.
    num_rounds  number of generation batches begun.
    num_extra   number of responses added to groups whose answers did not vary.
    num_stale   number of groups dropped because they are older than `oldest`.
    more        metrics that only refill.py has.
    """

    config: Config
    number: int
    oldest: int
    generated: list[Group] = field(default_factory=list)
    num_rounds: float = 0
    num_calls: int = 0
    num_extra: int = 0
    num_stale: int = 0
    more: dict[str, float] = field(default_factory=dict)

    def growth(self, group: Group) -> int:
        """Return how many responses to add to a group: 0 if it varies or has max_samples_per_prompt."""
        sampling = self.config.sampling
        room = sampling.max_samples_per_prompt - len(group.samples)
        return 0 if classify(group) == "mixed" else min(sampling.resample_size, room)

    def next_params(self) -> SamplingParams:
        """Return the sampling parameters with a new seed for the next call."""
        rollout = self.config.rollout
        entropy = [self.config.seed % 2**64, self.number, self.num_calls]
        self.num_calls += 1
        return SamplingParams(
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            max_new_tokens=rollout.max_response_tokens,
            seed=int(np.random.SeedSequence(entropy).generate_state(1)[0]),
        )

    def check_scored(self, groups: Iterable[Group]) -> None:
        """Raise RewardError if no sample of `groups` has a score: there is nothing to learn from."""
        failures = []
        for sample in (sample for group in groups for sample in group.samples):
            if sample.score.failure is None:
                return
            failures.append(sample.score.failure)
        if failures:
            raise RewardError(
                f"none of the {len(failures)} samples of rollout step {self.number} has a score; the first: {failures[0]}; "
                f"dapo-mcore reward-explain --function {self.config.reward.function} tries the reward function on one response"
                + (", and dapo-mcore tool a tool" if self.config.tools else "")
            )

    def stats(self) -> dict[str, float]:
        """Return the `sampling/…` metrics of generation. A ratio over nothing is NaN: all groups may be carried ones."""
        kinds = Counter(classify(group) for group in self.generated)
        samples = [sample for group in self.generated for sample in group.samples]
        return {
            "sampling/groups_generated": float(len(self.generated)),
            "sampling/groups_all_right": float(kinds["all_right"]),
            "sampling/groups_all_wrong": float(kinds["all_wrong"]),
            "sampling/kept_ratio": _ratio(sum(map(group_varies, self.generated)), len(self.generated)),
            "sampling/gen_batches": float(self.num_rounds),
            "sampling/resample_rate": _ratio(self.num_extra, len(samples)),
            "sampling/samples_generated": float(len(samples)),
            "sampling/generated_tokens": float(sum(sample.rollout.num_policy_tokens for sample in samples)),
            "sampling/groups_stale": float(self.num_stale),
            **self.more,
        }

    def summary(self) -> str:
        """Return what was generated, for an error message."""
        kinds = Counter(classify(group) for group in self.generated)
        return (
            f"{len(self.generated)} groups: {kinds['mixed']} varied, {kinds['all_right']} all right, "
            f"{kinds['all_wrong']} all wrong, {kinds['unscored']} without any score"
        )


def staleness_stats(groups: Sequence[Group], trained: int) -> dict[str, float]:
    """Return the `sampling/…` metrics about how old the weights are that generated `groups` (at least one).

    trained  weight version of the policy that trains on the groups. A group is as old as its oldest token. The mean over
             tokens is over those that the policy wrote, NaN if there are none.
    """
    ages = [trained - group.weight_version for group in groups]
    rollouts = [sample.rollout for group in groups for sample in group.samples]
    num_tokens = sum(rollout.num_policy_tokens for rollout in rollouts)
    return {
        "sampling/staleness_mean": sum(ages) / len(ages),
        "sampling/staleness_max": float(max(ages)),
        "sampling/token_staleness_mean": trained - _ratio(sum(map(_version_sum, rollouts)), num_tokens),
        "sampling/samples_resumed": float(sum(bool(rollout.version_spans) for rollout in rollouts)),
    }


def _version_sum(rollout: Rollout) -> int:
    """Return the sum of the weight versions that generated each token of the policy."""
    spans = rollout.version_spans or ((0, rollout.weight_version),)
    written = np.split(rollout.loss_mask, [start for start, _ in spans[1:]])
    return sum(int(np.count_nonzero(part)) * version for (_, version), part in zip(spans, written, strict=True))


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
