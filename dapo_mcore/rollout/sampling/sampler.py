"""Dynamic sampling: the groups that a rollout step trains on (DAPO, arXiv 2503.14476, section 3.2).

Change here: which groups a step trains on, and what happens to the others. rounds.py and refill.py generate them;
algo/filtering.py defines when a group varies.
Groups are taken in prompt order, never in the order in which they finish, which would favour short responses. With
sampling.on_full keep, groups of the oldest weights come first. Unlike verl, groups beyond the training batch are carried
to the next step while their weights are fresh enough.
"""

from __future__ import annotations

from collections import Counter, deque
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
from dapo_mcore.rollout.sampling.step import KEEPS, Step, staleness_stats
from dapo_mcore.types import ContinuousEngine, Group, Prompt, RewardFunction, RolloutEngine


@dataclass(frozen=True, slots=True)
class Collected:
    """The result of one rollout step.

    groups     the groups to train on, in prompt order; those of older weights, such as carried ones, come first.
    generated  all groups finished in this step, trained on or not. Reward and length metrics are about these.
    stats      the `sampling/…` metrics.
    """

    groups: list[Group]
    generated: list[Group]
    stats: dict[str, float]


class NothingVaries(RolloutError):
    """Too few groups vary to train on. `collected.generated` are the groups that the step generated."""

    def __init__(self, message: str, collected: Collected):
        super().__init__(message)
        self.collected = collected


@dataclass(frozen=True, slots=True)
class SamplerState:
    """State of a sampler between two steps, by reference: carried groups, and prompts to generate for again."""

    carried: Sequence[Group]
    again: Sequence[Prompt]

    def pack(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return JSON-ready values and arrays. With the loader's state they are all that a resumed run needs."""
        state, arrays = pack_groups(self.carried)
        return {**state, "again": [prompt.uid for prompt in self.again]}, arrays


@dataclass(frozen=True, slots=True)
class Position:
    """The data position after a rollout step. It holds references, so keeping it costs nothing."""

    loader: dict[str, Any]
    sampler: SamplerState


class Sampler:
    """Takes prompts, generates and scores responses, and chooses the groups to train on."""

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
        self._again: deque[Prompt] = deque()
        self._kept_ratio: float | None = None
        self._taken: list[Prompt] = []  # in the current step
        self.rescued: tuple[dict[str, Any], SamplerState] | None = None

    def collect(self, step: int, lag: int = 0) -> Collected:
        """Return the groups of rollout step `step`: train_batch_prompts, or fewer if sampling.on_exhausted allows it or the last epoch
        is over; then perhaps none.

        lag  weight versions by which the policy that trains on the groups is ahead of the engine's weights.
        The engine's seeds depend on (config.seed, step, call), so a resumed run repeats the step on a repeatable engine.
        Raise NothingVaries if too few groups vary after max_gen_batches rounds. If anything else ends the step, such as a signal,
        and checkpoint.keep_rollouts is true, `rescued` holds the states of loader and sampler with which a resumed run repeats it:
        finished groups are carried, and the other prompts are asked again.
        """
        sampling = self._config.sampling
        trained = self._engine.weight_version + lag
        this = Step(self._config, step, oldest=trained - sampling.max_staleness)
        kept = [group for group in self._carried if group.weight_version >= this.oldest]
        this.num_stale = num_stale = len(self._carried) - len(kept)
        carried = {id(group) for group in kept}
        self.rescued, self._taken = None, []
        try:
            kept += self._generate(this, kept)
        except BaseException:
            if self._config.checkpoint.keep_rollouts:
                self._rescue(this, kept)
            raise
        kept.sort(key=lambda group: group.weight_version)  # without on_full keep they already are in this order
        groups, surplus = kept[: sampling.train_batch_prompts], kept[sampling.train_batch_prompts :]
        if len(groups) < sampling.train_batch_prompts and self._loader.num_left + len(self._again):
            self._check_exhausted(len(groups), this)
        self._carried = surplus if sampling.carry_surplus else []
        stats = this.stats() | {
            "sampling/groups_kept": float(len(groups)),
            "sampling/surplus_reused": float(sum(id(group) in carried for group in groups)),
            "sampling/surplus_carried": float(len(self._carried)),
            "sampling/surplus_dropped": float(num_stale + len(surplus) - len(self._carried)),
        }
        if groups:
            stats |= staleness_stats(groups, trained)
        return Collected(groups, this.generated, stats)

    @property
    def num_left(self) -> float:
        """Number of groups that later steps may train on at most: those of prompts to come, in flight or to be asked again, and
        carried ones. Infinity without a last epoch."""
        return self._loader.num_left + len(self._again) + len(self._pending) + len(self._carried)

    def snapshot(self) -> SamplerState:
        """Return the current state; nothing is copied.

        A resumed run generates for the prompts of pending groups again, and estimates anew how many groups are kept.
        """
        return SamplerState(self._carried, [*(group.prompt for group in self._pending), *self._again])

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return the current snapshot as JSON-ready values and arrays."""
        return self.snapshot().pack()

    def load_state(self, state: dict[str, Any], arrays: dict[str, np.ndarray], prompts: Mapping[str, Prompt]) -> str:
        """Restore what `state()` returned. Return one line about what was lost, empty if nothing was.

        prompts  the training prompts by uid. Groups of a prompt that is not among them are dropped: it has left the data.
        """
        self._carried = unpack_groups(state, arrays, prompts)
        self._again = deque(prompts[uid] for uid in state["again"] if uid in prompts)
        found = {
            "carried groups": (state["groups"], self._carried),
            "prompts to generate again": (state["again"], self._again),
        }
        lost = [f"{len(a) - len(b)} of {len(a)} {what}" for what, (a, b) in found.items() if len(b) < len(a)]
        if not lost:
            return ""
        return f"{' and '.join(lost)} dropped: the training data no longer contain their prompts"

    def _generate(self, this: Step, carried: list[Group]) -> list[Group]:
        """Return new groups that fill the batch together with `carried`, as far as the limits allow.

        This runs even when nothing is missing, so that which metrics a step has depends on the engine alone.
        """
        if not isinstance(self._engine, ContinuousEngine):
            missing = self._config.sampling.train_batch_prompts - len(carried)
            return play_rounds(this, self._responder, self._take, missing)
        refilled = Refill(this, self._responder, self._take, carried, self._pending, self._kept_ratio).run()
        self._pending, self._kept_ratio = refilled.pending, refilled.kept_ratio
        self._again.extendleft(reversed(refilled.aborted))
        return refilled.groups

    def _take(self, count: int) -> list[Prompt]:
        """Return the next `count` prompts, first those whose responses were aborted."""
        again = [self._again.popleft() for _ in range(min(count, len(self._again)))]
        taken = again + self._loader.take(count - len(again))
        self._taken += taken
        return taken

    def _rescue(self, this: Step, carried: Sequence[Group]) -> None:
        keeps, finished = KEEPS[self._config.sampling.style], Counter(id(group.prompt) for group in this.generated)
        kept = [group for group in this.generated if keeps(group) and group.weight_version >= this.oldest]
        again = []
        for prompt in (*(group.prompt for group in self._pending), *self._taken):
            finished[id(prompt)] -= 1
            if finished[id(prompt)] < 0:
                again.append(prompt)
        self.rescued = self._loader.state(), SamplerState([*carried, *kept], [*again, *self._again])

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
