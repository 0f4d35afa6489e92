"""Quantities that may be set in two units, brought to the one that the stages use.

Change here: a conversion. Which keys are pairs stands in their sections (values.TwoUnits), which refuse both at once. Afterwards the
other key is null, so that a printed configuration can be read again.
"""

from __future__ import annotations

from typing import TypeVar

from dapo_mcore.config.optimizer import OptimizerConfig
from dapo_mcore.config.sections import BatchConfig
from dapo_mcore.config.settings import Settings
from dapo_mcore.config.values import Section

P = TypeVar("P", bound=OptimizerConfig)


def in_one_unit(c: Settings) -> dict[str, Section]:
    """Return the sections of `c` with such keys, converted. Raise ValueError for a number that does not divide."""
    batch = _batch(c)
    updates = c.model_copy(update={"batch": batch}).updates_per_step
    critic = c.critic.model_copy(update={"optimizer": _optimizer(c.critic.optimizer, updates)})
    return {"batch": batch, "optimizer": _optimizer(c.optimizer, updates), "critic": critic}


def _batch(c: Settings) -> BatchConfig:
    samples, size, train = c.batch.mini_batch_samples, c.rollout.group_size, c.sampling.train_batch_prompts
    if samples is None:
        return c.batch
    if samples % size or train % (samples // size):
        fit = [prompts * size for prompts in range(1, train + 1) if train % prompts == 0]
        near = [
            *[fitting for fitting in fit if fitting < samples][-1:],
            *[fitting for fitting in fit if fitting > samples][:1],
        ]
        raise ValueError(
            f"batch.mini_batch_samples {samples}: mini-batches have whole groups of rollout.group_size {size}, and equal parts of "
            f"sampling.train_batch_prompts {train}; use {' or '.join(map(str, near))}"
        )
    return c.batch.model_copy(update={"mini_batch_prompts": samples // size, "mini_batch_samples": None})


def _optimizer(optimizer: P, updates: int) -> P:
    """Return the optimizer's section with its schedule in gradient steps, `updates` of which are a full rollout step."""
    given = {"warmup": optimizer.warmup_rollout_steps, "decay": optimizer.decay_rollout_steps}
    converted: dict[str, int | None] = {}
    for name, steps in given.items():
        if steps is not None:
            converted |= {f"{name}_updates": steps * updates, f"{name}_rollout_steps": None}
    return optimizer.model_copy(update=converted)
