"""What a run writes and shows about a rollout step: metrics of its groups, some samples, and what had no score.

Change here: which parts of a step are kept for its row, its samples and the screen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dapo_mcore.config.schema import Config
from dapo_mcore.observe.metrics import group_metrics, tool_metrics
from dapo_mcore.observe.samples import pick_samples, write_samples
from dapo_mcore.observe.sinks import attempt
from dapo_mcore.rollout.sampling.sampler import Collected
from dapo_mcore.types import Group, Prompt, Sample


@dataclass(frozen=True, slots=True)
class StepReport:
    """A step's report. It is made before the step's training, so that the memory of all other samples is free by the time the next
    step's samples arrive.

    metrics  of the groups and of their sampling.
    shown    the samples to write to the run's folder, with their prompts.
    failure  why the first of the samples without a score has none.
    """

    metrics: dict[str, float]
    shown: list[tuple[Prompt, Sample]]
    failure: str | None

    @classmethod
    def of(cls, collected: Collected, groups: Sequence[Group], config: Config) -> StepReport:
        """Return the report of `collected`, which shows samples of `groups`."""
        failures = (sample.score.failure for group in collected.generated for sample in group.samples)
        metrics = {**group_metrics(collected.generated, collected.groups), **collected.stats}
        if config.tools:
            metrics |= tool_metrics(collected.generated)
        shown = pick_samples(groups, config.observe.samples_per_step)
        return cls(metrics, shown, next(filter(None, failures), None))

    @property
    def num_failures(self) -> int:
        """Number of samples that could not be scored."""
        return int(self.metrics["reward/failures"])

    @property
    def failures(self) -> str:
        """How many samples could not be scored, and why the first could not."""
        total = int(self.metrics["sampling/samples_generated"])
        return f"{self.num_failures} of {total} samples have no score; the first: {self.failure}"

    def write_samples(self, run_dir: Path, step: int, tell: Callable[[str], object]) -> None:
        """Write the samples to show. If that fails, tell it: a run goes on without them."""
        attempt("write samples", lambda: write_samples(run_dir, step, self.shown), tell)
