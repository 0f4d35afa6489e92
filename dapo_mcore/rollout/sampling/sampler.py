"""One rollout step's groups: dynamic sampling (DAPO, arXiv 2503.14476, section 3.2).

Change here: which groups a step trains on, and what happens to the rest. How they are generated is rounds.py and
refill.py; what it means to vary, algo/filtering.py.
Groups are always taken in prompt order, never in the order they finish, which would favour short responses; with
sampling.on_full keep, those of the oldest weights come first. Unlike verl, groups beyond the training batch are carried to
the next step while their weights are fresh enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dapo_mcore.config.schema import Config
from dapo_mcore.data.loader import PromptLoader
from dapo_mcore.errors import RolloutError
from dapo_mcore.observe.progress import NullProgress
from dapo_mcore.observe.timing import PhaseTimer
from dapo_mcore.rollout.sampling.carry import pack_groups, unpack_groups
from dapo_mcore.rollout.sampling.refill import InFlight, Refill
from dapo_mcore.rollout.sampling.respond import Decode, Responder
from dapo_mcore.rollout.sampling.rounds import play_rounds
from dapo_mcore.rollout.sampling.staleness import staleness_stats
from dapo_mcore.rollout.sampling.step import Step
from dapo_mcore.types import ContinuousEngine, Group, Prompt, RewardFunction, RolloutEngine


@dataclass(frozen=True, slots=True)
class Collected:
    """What one rollout step brought.

    groups     to train on, in prompt order; groups of older weights, as those carried from the step before, come first.
    generated  every group finished in this step, trained on or not: what reward and length metrics are about.
    stats      the `sampling/…` metrics.
    """

    groups: list[Group]
    generated: list[Group]
    stats: dict[str, float]


class NothingVaries(RolloutError):
    """Too few groups vary to train on. `collected.generated` are those that the step has, to be looked at."""

    def __init__(self, message: str, collected: Collected):
        super().__init__(message)
        self.collected = collected


@dataclass(frozen=True, slots=True)
class SamplerState:
    """What a sampler holds between two steps, by reference: groups carried over, and prompts to ask again."""

    carried: Sequence[Group]
    again: Sequence[Prompt]

    def pack(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return JSON-ready values and arrays: with the loader's state, all that a resumed run needs."""
        state, arrays = pack_groups(self.carried)
        return {**state, "again": [prompt.uid for prompt in self.again]}, arrays


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
        self._pending: list[InFlight] = []
        self._again: list[Prompt] = []
        self._kept_ratio: float | None = None

    def collect(self, step: int, lag: int = 0) -> Collected:
        """The groups of rollout step `step`; train_batch_prompts of them, unless sampling.on_exhausted allows fewer.

        lag  weight versions by which the trained policy will be ahead of the engine's when it trains on the groups.
        Engine seeds derive from (config.seed, step, call), so a resumed run repeats the step on an engine that is
        repeatable. Raises NothingVaries when max_gen_batches rounds do not bring enough groups that vary.
        """
        sampling = self._config.sampling
        trained = self._engine.weight_version + lag
        this = Step(self._config, step, oldest=trained - sampling.max_staleness)
        kept = [group for group in self._carried if group.weight_version >= this.oldest]
        this.num_stale = num_stale = len(self._carried) - len(kept)
        carried = {id(group) for group in kept}
        kept += self._generate(this, kept)
        kept.sort(key=lambda group: group.weight_version)  # only with on_full keep are they not in this order already
        groups, surplus = kept[: sampling.train_batch_prompts], kept[sampling.train_batch_prompts :]
        if len(groups) < sampling.train_batch_prompts:
            self._check_exhausted(len(groups), this)
        self._carried = surplus if sampling.carry_surplus else []
        stats = this.stats() | {
            "sampling/groups_kept": float(len(groups)),
            "sampling/surplus_reused": float(sum(id(group) in carried for group in groups)),
            "sampling/surplus_carried": float(len(self._carried)),
            "sampling/surplus_dropped": float(num_stale + len(surplus) - len(self._carried)),
        }
        stats |= staleness_stats(groups, trained)
        return Collected(groups, this.generated, stats)

    def snapshot(self) -> SamplerState:
        """Return the state of now; nothing is copied. A resumed run asks the prompts of pending groups again, and learns anew
        how many are kept."""
        return SamplerState(self._carried, [*(group.prompt for group in self._pending), *self._again])

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return the snapshot of now as JSON-ready values and arrays."""
        return self.snapshot().pack()

    def load_state(self, state: dict[str, Any], arrays: dict[str, np.ndarray], prompts: Mapping[str, Prompt]) -> str:
        """Restore `state()`, with the training prompts by uid, and return what could not be restored, or nothing.

        Work on a prompt that is not among them is dropped: its responses answer something that is not asked any more.
        """
        self._carried = unpack_groups(state, arrays, prompts)
        self._again = [prompts[uid] for uid in state["again"] if uid in prompts]
        found = {
            "carried groups": (state["groups"], self._carried),
            "prompts to ask again": (state["again"], self._again),
        }
        lost = [f"{len(a) - len(b)} of {len(a)} {what}" for what, (a, b) in found.items() if len(b) < len(a)]
        if not lost:
            return ""
        return f"{' and '.join(lost)} dropped: no training prompt has their tokens, answer and columns any more"

    def _generate(self, this: Step, carried: list[Group]) -> list[Group]:
        """New groups that fill the batch beside `carried`, as far as the limits allow; without a new request when it is full.
        Which metrics a step has depends on the engine alone."""
        if not isinstance(self._engine, ContinuousEngine):
            missing = self._config.sampling.train_batch_prompts - len(carried)
            return play_rounds(this, self._responder, self._take, missing)
        refilled = Refill(this, self._responder, self._take, carried, self._pending, self._kept_ratio).run()
        self._pending, self._kept_ratio = refilled.pending, refilled.kept_ratio
        self._again = refilled.aborted + self._again
        return refilled.groups

    def _take(self, count: int) -> list[Prompt]:
        """The next prompts: first those whose responses were aborted."""
        again, self._again = self._again[:count], self._again[count:]
        return again + self._loader.take(count - len(again))

    def _check_exhausted(self, num_kept: int, this: Step) -> None:
        sampling = self._config.sampling
        if num_kept and sampling.on_exhausted == "train_on_what_we_have":
            return
        more = "max_samples_per_prompt" if sampling.style == "resample" else "gen_batch_prompts"
        last = "set sampling.on_exhausted train_on_what_we_have" if num_kept else "check the reward function"
        raise NothingVaries(
            f"{num_kept} of sampling.train_batch_prompts {sampling.train_batch_prompts} groups have answers that vary "
            f"after sampling.max_gen_batches {sampling.max_gen_batches} rounds ({this.summary()}); "
            f"raise max_gen_batches or {more}, choose prompts nearer to the policy's ability, or {last}",
            Collected([], this.generated, this.stats()),
        )
