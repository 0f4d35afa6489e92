"""Generation in rounds, for an engine that generates one batch at a time: a round ends with its longest response.

Change here: what one round of each sampling style generates. A repeatable engine gives bitwise repeatable rounds.
refill.py does the same for servers, which it keeps full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from dapo_mcore.algo.filtering import classify, group_varies
from dapo_mcore.rollout.sampling.respond import Responder
from dapo_mcore.rollout.sampling.step import Step
from dapo_mcore.types import Group, Prompt, Sample

Take = Callable[[int], list[Prompt]]
"""Returns the next `n` prompts to generate for, or fewer if the last epoch ends before."""


def play_rounds(step: Step, responder: Responder, take: Take, missing: int) -> list[Group]:
    """Return at least `missing` groups to train on, in prompt order, or fewer after max_gen_batches rounds or the last prompt."""
    rounds, kept = _Rounds(step, responder, take), []
    style = {"none": rounds.none, "filter": rounds.filter, "resample": rounds.resample}[step.config.sampling.style]
    most = step.config.sampling.max_gen_batches
    while len(kept) < missing and step.num_rounds < most and not rounds.prompts_are_over:
        kept += style(missing - len(kept))
        step.check_scored(step.generated)
    return kept


class _Rounds:
    def __init__(self, step: Step, responder: Responder, take: Take):
        self._step, self._responder, self._take = step, responder, take
        self.prompts_are_over = False

    def none(self, missing: int) -> list[Group]:
        return self._finish(self._new_groups(missing))

    def filter(self, missing: int) -> list[Group]:
        """Generate a whole batch and return the groups that vary, perhaps more than `missing` (paper, verl)."""
        groups = self._finish(self._new_groups(self._step.config.sampling.gen_batch_prompts))
        return [group for group in groups if group_varies(group)]

    def resample(self, missing: int) -> list[Group]:
        """Generate groups and add responses to each until it varies or is full. Return those that vary, whole."""
        groups = self._new_groups(missing)
        while growing := [index for index, group in enumerate(groups) if self._step.growth(group)]:
            enlarged = self._enlarge([groups[index] for index in growing])
            for index, group in zip(growing, enlarged):
                groups[index] = group
        return [group for group in self._finish(groups) if classify(group) == "mixed"]

    def _new_groups(self, num_prompts: int) -> list[Group]:
        """Begin a round: generate group_size responses for each of the next prompts, if there are any."""
        prompts = self._take(num_prompts)
        self.prompts_are_over = len(prompts) < num_prompts
        if not prompts:
            return []
        self._step.num_rounds += 1
        return self._responder.groups(prompts, self._step.config.rollout.group_size, self._step.next_params())

    def _enlarge(self, groups: Sequence[Group]) -> list[Group]:
        """Return the groups with `growth` more responses each, all generated in one call."""
        growth = self._step.growth
        repeated = [group.prompt for group in groups for _ in range(growth(group))]
        self._step.num_extra += len(repeated)
        samples = iter(self._responder.samples(repeated, self._step.next_params()))
        return [Group(g.prompt, g.samples + _next(samples, growth(g))) for g in groups]

    def _finish(self, groups: list[Group]) -> list[Group]:
        """Record a round's groups once they have their final size, and return them."""
        self._step.generated += groups
        return groups


def _next(samples: Iterator[Sample], count: int) -> tuple[Sample, ...]:
    return tuple(next(samples) for _ in range(count))
