"""What one rollout step has generated: the seeds of its calls, its counts and its metrics.

Change here: what is counted about a step, however its groups were generated (rounds.py, refill.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from dapo_mcore.algo.filtering import classify, group_varies
from dapo_mcore.config.schema import Config
from dapo_mcore.errors import RewardError
from dapo_mcore.types import Group, SamplingParams


@dataclass
class Step:
    """The ledger of rollout step `number`.

    oldest      the oldest weight version that a group may have and be trained on.
    generated   every group finished in this step, in prompt order.
    num_rounds  generation batches begun.
    num_extra   responses added to uniform groups.
    num_stale   groups older than `oldest`, dropped.
    more        metrics of one way of generating alone.
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
        """How many responses to add to a group: 0 when it varies or has reached max_samples_per_prompt."""
        sampling = self.config.sampling
        room = sampling.max_samples_per_prompt - len(group.samples)
        return 0 if classify(group) == "mixed" else min(sampling.resample_size, room)

    def next_params(self) -> SamplingParams:
        """The sampling law with the next call's own seed."""
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
        """Raise RewardError where scoring failed for every sample of `groups`: nothing can be learned from failures."""
        failures = []
        for sample in (sample for group in groups for sample in group.samples):
            if sample.score.failure is None:
                return
            failures.append(sample.score.failure)
        if failures:
            raise RewardError(
                f"the reward function {self.config.reward.function} failed on all {len(failures)} samples of rollout step "
                f"{self.number}; the first: {failures[0]}; try it on one response with dapo-mcore reward-explain"
            )

    def stats(self) -> dict[str, float]:
        """The `sampling/…` metrics of generation. A ratio over nothing is NaN: every group may have been carried over."""
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
            "sampling/generated_tokens": float(sum(len(sample.rollout.token_ids) for sample in samples)),
            "sampling/groups_stale": float(self.num_stale),
            **self.more,
        }

    def summary(self) -> str:
        """What was generated, for an error message."""
        kinds = Counter(classify(group) for group in self.generated)
        return (
            f"{len(self.generated)} groups: {kinds['mixed']} varied, {kinds['all_right']} all right, "
            f"{kinds['all_wrong']} all wrong, {kinds['unscored']} without any score"
        )


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
