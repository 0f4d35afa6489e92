"""The length of a run that is counted in epochs: how many rollout steps are left, exact without filtering, else an upper bound.

Change here: the arithmetic of the bound, and what a run says about its end. Which steps there really are follows from the groups
that are kept (sampler.py).
"""

from __future__ import annotations

import math

from dapo_mcore.config.follows import describe_decay
from dapo_mcore.config.schema import Config
from dapo_mcore.config.sections import SamplingConfig
from dapo_mcore.errors import ConfigError
from dapo_mcore.observe.progress import NullProgress
from dapo_mcore.rollout.sampling.sampler import Collected, NothingVaries


class RunLength:
    """Which rollout step is the last. In a run of `num_epochs` it shows what is known, and raises ConfigError for settings about
    steps that the run cannot have.

    last_step  None while the last epoch is not over.
    """

    def __init__(self, config: Config, num_prompts: int, progress: NullProgress):
        self._config, self._progress = config, progress
        self.last_step = config.num_rollout_steps
        if config.num_epochs is not None:
            check_length(config, num_prompts)
            for line in describe_length(config, num_prompts):
                progress.line(line)
            self.look_ahead(0, config.num_epochs * num_prompts)

    def goes_on_after(self, step: int) -> bool:
        """Return False if `step` is known to be the last."""
        return self.last_step is None or step < self.last_step

    def look_ahead(self, step: int, num_left: float, collected: Collected | None = None) -> None:
        """Learn that after `step`, which trains on `collected`, at most `num_left` groups are left to train on."""
        if self._config.num_epochs is None:
            return
        sampling = self._config.sampling
        self._progress.expect(step + most_steps(int(num_left), sampling), is_exact(sampling))
        if num_left:
            return
        self.last_step = step
        if collected is not None:
            dropped = int(collected.stats["sampling/surplus_dropped"])
            lost = f"; {dropped} more were dropped (too old, or sampling.carry_surplus false)" if dropped else ""
            self._progress.line(
                f"num_epochs {self._config.num_epochs} is over: rollout step {step} is the last, with {len(collected.groups)} of "
                f"sampling.train_batch_prompts {sampling.train_batch_prompts} groups{lost}"
            )

    def end_before(self, step: int, collected: Collected) -> None:
        """End the run with the step before `step`, for which the last prompts gave no group. Raise NothingVaries if there is none."""
        names = (
            "sampling/groups_generated",
            "sampling/groups_all_right",
            "sampling/groups_all_wrong",
            "sampling/groups_stale",
            "sampling/surplus_dropped",
        )
        made, right, wrong, stale, carried = (int(collected.stats[name]) for name in names)
        told = (
            f"num_epochs {self._config.num_epochs} is over, and none of the last {made + carried} groups is left to train on ({right} all right, "
            f"{wrong} all wrong, {stale} too old)"
        )
        if step == 1:
            raise NothingVaries(
                f"{told}; choose prompts nearer to the policy's ability, or check the reward function", collected
            )
        self.last_step = step - 1
        self._progress.line(f"{told}; the run ends with rollout step {step - 1}")


def most_steps(num_groups: int, sampling: SamplingConfig) -> int:
    """Return the largest number of rollout steps that may train on so many more groups.

    A step takes train_batch_prompts of them. One that keeps fewer (on_exhausted) has used up max_gen_batches batches of prompts.
    Example: 100 groups in steps of 32 are at most 4 steps.
    """
    fewest = sampling.train_batch_prompts
    if sampling.style == "filter":
        fewest = min(fewest, sampling.gen_batch_prompts * sampling.max_gen_batches)
    return math.ceil(num_groups / fewest)


def is_exact(sampling: SamplingConfig) -> bool:
    """Return True if `most_steps` is the number of steps: every group is kept, and none becomes too old."""
    return sampling.style == "none" and sampling.on_full != "keep"


def describe_length(config: Config, num_prompts: int) -> list[str]:
    """Return lines about the length of a run of `num_epochs`: `num_epochs 3 × 100 prompts: at most 10 rollout steps …`, and where
    a cosine ends in it."""
    num_epochs, sampling = config.num_epochs, config.sampling
    assert num_epochs is not None
    most = most_steps(num_epochs * num_prompts, sampling)
    what = f"num_epochs {num_epochs} × {num_prompts:,} prompts"
    told = f"{what}: at most {most:,} rollout steps, fewer as groups are filtered out"
    if is_exact(sampling):
        told = f"{what}: {most:,} rollout steps, {most * config.updates_per_step:,} gradient steps at most"
    elif sampling.style == "filter" and not sampling.carry_surplus:
        told += " or dropped (sampling.carry_surplus false)"
    return [told, *describe_decay(config, most, is_exact(sampling))]


def check_length(config: Config, num_prompts: int) -> None:
    """Raise ConfigError for settings about rollout steps that a run of `num_epochs` cannot have. See rules.py for other runs."""
    most = most_steps((config.num_epochs or 0) * num_prompts, config.sampling)
    has = f"num_epochs {config.num_epochs} × {num_prompts:,} prompts give at most {most:,} rollout steps"
    if config.critic.warmup_steps >= most:
        raise ConfigError(
            f"critic.warmup_steps {config.critic.warmup_steps} leaves none of the run's steps to train the policy in: {has}; use at most "
            f"{most - 1}"
        )
    if beyond := [step for step in config.observe.profile_steps if step > most]:
        raise ConfigError(f"observe.profile_steps has {beyond[0]}, but {has}; name earlier steps, for instance [2]")
