"""One rollout step's groups: dynamic sampling (DAPO, arXiv 2503.14476, section 3.2).

Change here: which groups a step trains on, and what happens to the rest. What it means to vary is algo/filtering.py.
Groups are always taken in prompt order, never in the order they finish, which would favour short responses.
Unlike verl, groups beyond the training batch are carried to the next step while their weights are fresh enough.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dapo_mcore.algo.filtering import classify, group_varies
from dapo_mcore.config import Config
from dapo_mcore.data.loader import PromptLoader
from dapo_mcore.errors import RolloutError
from dapo_mcore.observe.progress import NullProgress
from dapo_mcore.observe.timing import PhaseTimer
from dapo_mcore.rollout.carry import pack_groups, unpack_groups
from dapo_mcore.rollout.respond import Decode, Responder
from dapo_mcore.types import Group, Prompt, RewardFunction, RolloutEngine, Sample, SamplingParams


@dataclass(frozen=True, slots=True)
class Collected:
    """What one rollout step brought.

    groups     to train on, in prompt order; groups carried from the step before come first.
    generated  every group finished in this step, trained on or not: what reward and length metrics are about.
    stats      the `sampling/…` metrics.
    """

    groups: list[Group]
    generated: list[Group]
    stats: dict[str, float]


class Sampler:
    """Draws prompts, generates and scores responses, and chooses the groups to train on."""

    def __init__(
        self,
        engine: RolloutEngine,
        loader: PromptLoader,
        reward: RewardFunction,
        decode: Decode,
        config: Config,
        progress: NullProgress | None = None,
        timer: PhaseTimer | None = None,
    ):
        self._engine, self._config = engine, config
        self._loader = loader
        self._responder = Responder(engine, reward, decode, progress, timer)
        self._carried: list[Group] = []

    def collect(self, step: int) -> Collected:
        """The groups of rollout step `step`; train_batch_prompts of them, unless sampling.on_exhausted allows fewer.

        Engine seeds derive from (config.seed, step, call), so a resumed run repeats the step.
        Raises RolloutError when max_gen_batches rounds do not bring enough groups that vary.
        """
        sampling = self._config.sampling
        kept, num_stale = self._fresh_carried()
        num_reused = min(len(kept), sampling.train_batch_prompts)
        this = _Step(self._config, self._loader, self._responder, step)
        play_round = {"none": _round_none, "filter": _round_filter, "resample": _round_resample}[sampling.style]
        while len(kept) < sampling.train_batch_prompts and this.num_rounds < sampling.max_gen_batches:
            kept += play_round(this, sampling.train_batch_prompts - len(kept))
        groups, surplus = kept[: sampling.train_batch_prompts], kept[sampling.train_batch_prompts :]
        if len(groups) < sampling.train_batch_prompts:
            self._check_exhausted(len(groups), this)
        self._carried = surplus if sampling.carry_surplus else []
        stats = this.stats() | {
            "sampling/groups_kept": float(len(groups)),
            "sampling/surplus_reused": float(num_reused),
            "sampling/surplus_carried": float(len(self._carried)),
            "sampling/surplus_dropped": float(num_stale + len(surplus) - len(self._carried)),
        }
        return Collected(groups, this.generated, stats)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The carried groups as JSON-ready values and arrays; with the loader's state, all a resumed run needs."""
        return pack_groups(self._carried)

    def load_state(self, state: dict[str, Any], arrays: dict[str, np.ndarray], prompts: Mapping[str, Prompt]) -> None:
        """Restores `state()` exactly, with the training prompts by uid. Raises CheckpointError for an unknown uid."""
        self._carried = unpack_groups(state, arrays, prompts)

    def _fresh_carried(self) -> tuple[list[Group], int]:
        """Carried groups that may still be trained on, and how many have become too stale."""
        oldest = self._engine.weight_version - self._config.sampling.max_staleness
        fresh = [group for group in self._carried if group.weight_version >= oldest]
        return fresh, len(self._carried) - len(fresh)

    def _check_exhausted(self, num_kept: int, this: _Step) -> None:
        sampling = self._config.sampling
        if num_kept and sampling.on_exhausted == "train_on_what_we_have":
            return
        more = "max_samples_per_prompt" if sampling.style == "resample" else "gen_batch_prompts"
        last = "set sampling.on_exhausted train_on_what_we_have" if num_kept else "check the reward function"
        raise RolloutError(
            f"{num_kept} of sampling.train_batch_prompts {sampling.train_batch_prompts} groups have answers that vary "
            f"after sampling.max_gen_batches {sampling.max_gen_batches} rounds ({this.summary()}); "
            f"raise max_gen_batches or {more}, choose prompts nearer to the policy's ability, or {last}"
        )


def _round_none(this: _Step, missing: int) -> list[Group]:
    return this.finish(this.new_groups(missing))


def _round_filter(this: _Step, missing: int) -> list[Group]:
    """Filter and refill (paper, verl): a whole generation batch; the groups that vary, possibly more than `missing`."""
    groups = this.finish(this.new_groups(this.config.sampling.gen_batch_prompts))
    return [group for group in groups if group_varies(group)]


def _round_resample(this: _Step, missing: int) -> list[Group]:
    """Per-prompt resampling: uniform groups grow until they vary or are given up. Enlarged groups are kept whole."""
    groups = this.new_groups(missing)
    while growing := [index for index, group in enumerate(groups) if this.growth(group)]:
        enlarged = this.enlarge([groups[index] for index in growing])
        for index, group in zip(growing, enlarged):
            groups[index] = group
    return [group for group in this.finish(groups) if classify(group) == "mixed"]


@dataclass
class _Step:
    """The generation of one rollout step, and its counts."""

    config: Config
    loader: PromptLoader
    responder: Responder
    step: int
    generated: list[Group] = field(default_factory=list)
    num_rounds: int = 0
    num_calls: int = 0
    num_extra: int = 0

    def new_groups(self, num_prompts: int) -> list[Group]:
        """Begins a round: group_size responses to each of the next prompts."""
        self.num_rounds += 1
        prompts = self.loader.take(num_prompts)
        return self.responder.groups(prompts, self.config.rollout.group_size, self._next_params())

    def growth(self, group: Group) -> int:
        """How many responses to add to a group: 0 when it varies or has reached max_samples_per_prompt."""
        sampling = self.config.sampling
        room = sampling.max_samples_per_prompt - len(group.samples)
        return 0 if classify(group) == "mixed" else min(sampling.resample_size, room)

    def enlarge(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with `growth` more responses each, all generated in one call."""
        repeated = [group.prompt for group in groups for _ in range(self.growth(group))]
        self.num_extra += len(repeated)
        samples = iter(self.responder.samples(repeated, self._next_params()))
        return [Group(g.prompt, g.samples + _take(samples, self.growth(g))) for g in groups]

    def finish(self, groups: list[Group]) -> list[Group]:
        """Records a round's groups in their final size."""
        self.generated += groups
        return groups

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
        }

    def summary(self) -> str:
        """What the rounds brought, for an error message."""
        kinds = Counter(classify(group) for group in self.generated)
        return (
            f"{len(self.generated)} groups: {kinds['mixed']} varied, {kinds['all_right']} all right, "
            f"{kinds['all_wrong']} all wrong, {kinds['unscored']} without any score"
        )

    def _next_params(self) -> SamplingParams:
        """The sampling law with this call's own seed."""
        rollout = self.config.rollout
        entropy = [self.config.seed % 2**64, self.step, self.num_calls]
        self.num_calls += 1
        return SamplingParams(
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            max_new_tokens=rollout.max_response_tokens,
            seed=int(np.random.SeedSequence(entropy).generate_state(1)[0]),
        )


def _take(samples: Iterator[Sample], count: int) -> tuple[Sample, ...]:
    return tuple(next(samples) for _ in range(count))


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
